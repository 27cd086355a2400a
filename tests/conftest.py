"""What tests share: a trained model on digits, a bundle made from it, and real data where it lies beside the repo."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

import compress_uq as cuq
from compress_uq_cli.main import main

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _quiet_threads():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """A folder with public data sets and third-party weights; not part of the product."""
    folder = Path(os.environ.get("COMPRESS_UQ_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "predictions").is_dir():
        pytest.skip(f"real data are not at {folder}: set COMPRESS_UQ_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def real_data_module(real_data):
    """The loading code that comes with the real data."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("prepare", real_data / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A small CNN trained on digits by the command line, not to perfection."""
    out = tmp_path_factory.mktemp("train") / "model.pt"
    line = f"train --arch compress-uq:cnn --data digits --epochs 2 --lr 0.02 --out {out}"
    assert main(line.split()) == 0
    return out


@pytest.fixture(scope="session")
def dense(checkpoint):
    return cuq.read_checkpoint(checkpoint)


@pytest.fixture(scope="session")
def splits(dense) -> cuq.Splits:
    return cuq.load_splits("digits", record=dense.data)


@pytest.fixture(scope="session")
def bundle_folder(checkpoint, tmp_path_factory) -> Path:
    """A bundle made by the command line; read only."""
    out = tmp_path_factory.mktemp("bundle") / "b"
    assert main(f"prune {checkpoint} --sparsity 0.5 --epochs 2 --samples 8 --out {out}".split()) == 0
    return out


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """Run a command line in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield run
    for name in ("user_code", "user_data"):
        sys.modules.pop(name, None)
