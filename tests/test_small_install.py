"""What a server installs: onnxruntime, numpy and the wheel alone, in an environment that never saw torch."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import compress_uq as cuq
from small_models import decided_model

ROOT = Path(__file__).resolve().parent.parent
SHAPE = (1, 8, 8)

PROGRAM = """
import importlib.util, json, sys
import numpy as np
from compress_uq.runtime import OnnxPredictor
import compress_uq

assert compress_uq.OnnxPredictor is OnnxPredictor
answers = OnnxPredictor("model.onnx")(np.load("images.npy"))
np.savez("answers.npz", **answers._asdict())
try:
    OnnxPredictor("model.onnx")(np.zeros((1, 3, 8, 8), np.float32))
except compress_uq.InputError as error:
    refused = str(error)
there = [name for name in ("torch", "torchvision", "onnx", "sklearn", "typer") if importlib.util.find_spec(name)]
print(json.dumps({"there": there, "refused": refused, "version": compress_uq.__version__, "from": compress_uq.__file__}))
"""


def run(*command: object, folder: Path) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    line = [str(part) for part in command]
    return subprocess.run(line, cwd=folder, env=clean, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_predictor_without_torch(tmp_path):
    assert run(sys.executable, "-m", "venv", tmp_path / "venv", folder=tmp_path).returncode == 0
    python = tmp_path / "venv" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--retries", 1, "--timeout", 15]
    reached = run(*pip, "onnxruntime", "numpy", "hatchling", folder=tmp_path)
    if reached.returncode:
        pytest.skip(f"pip cannot install from an index: {reached.stderr.strip().splitlines()[-1]}")

    wheel = [
        python,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        tmp_path,
        ROOT,
    ]
    built = run(*wheel, folder=tmp_path)
    assert built.returncode == 0, built.stderr
    (file,) = tmp_path.glob("compress_uq-*.whl")
    with zipfile.ZipFile(file) as packed:
        assert "compress_uq/export/triton_model.py.txt" in packed.namelist()
    installed = run(*pip, "--no-deps", file, folder=tmp_path)
    assert installed.returncode == 0, installed.stderr

    cuq.export_onnx(decided_model(SHAPE, ("a", "b", "c", "d")), tmp_path / "model.onnx")
    images = np.random.default_rng(0).normal(size=(6, *SHAPE)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    done = run(python, "-c", PROGRAM, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["there"] == []
    assert said["version"] == cuq.__version__
    assert str(tmp_path) in said["from"]
    assert "expected (N, 1, 8, 8)" in said["refused"]
    wanted = cuq.OnnxPredictor(tmp_path / "model.onnx")(images)._asdict()
    with np.load(tmp_path / "answers.npz") as got:
        assert set(got) == set(wanted)
        for name, value in wanted.items():
            assert np.allclose(got[name], value, atol=1e-6), name

    # The whole package says what is missing, in the words of Python.
    whole = run(python, "-c", "import compress_uq; compress_uq.compress", folder=tmp_path)
    assert "No module named" in whole.stderr
