"""What is wrong with a file, a bundle, an image or a place ends in one line, exit code 2, and nothing left behind."""

import os
import shutil
import tempfile

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

import compress_uq as cuq
from compress_uq.errors import ArtifactError, InputError, MissingDependencyError

USER_DATA = """
import torch
import compress_uq as cuq
from torch.utils.data import TensorDataset

def colour(): return cuq.Splits(test=TensorDataset(torch.zeros(20, 3, 8, 8), torch.arange(20) % 10))
def large(): return cuq.Splits(test=TensorDataset(torch.zeros(20, 1, 9, 8), torch.arange(20) % 10))
def loud(): return cuq.Splits(test=TensorDataset(torch.full((20, 1, 8, 8), 255.0), torch.arange(20) % 10))
def labels(): return cuq.Splits(test=TensorDataset(torch.zeros(20, 1, 8, 8), torch.arange(20)))
"""


def foreign() -> bytes:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "g",
        [value("x", TensorProto.FLOAT, ["N", 2])], [value("y", TensorProto.FLOAT, ["N", 2])],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()


def without_outputs(content: bytes) -> bytes:
    model = onnx.load_from_string(content)
    del model.graph.output[3:]
    return model.SerializeToString()


def frozen(content: bytes) -> bytes:
    model = onnx.load_from_string(content)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 7
    return model.SerializeToString()


BROKEN = {
    "empty": lambda content: b"",
    "text": lambda content: b"this is no model",
    "cut": lambda content: content[: len(content) // 2],
    "foreign": lambda content: foreign(),
    "edited": without_outputs,
    "frozen": frozen,
    "torn": lambda content: content.replace(b'compress_uq.input\x12', b'compress_uq.imput\x12'),
    "garbled": lambda content: content.replace(b'"fixed"', b'"fixed '),
}  # fmt: skip
"""Contents of an .onnx file, made from a good one."""

PROTECTED = ("report.json", "model.onnx", "structure.json")


@pytest.fixture
def place(command, bundle_folder, tmp_path, monkeypatch):
    """Bad artifacts beside good ones; running a line in it shows that it ends well and leaves nothing."""
    content = (bundle_folder / "model.onnx").read_bytes()
    for name, spoil in BROKEN.items():
        (tmp_path / f"{name}.onnx").write_bytes(spoil(content))
    with (tmp_path / "big.onnx").open("wb") as file:
        file.truncate(2**31 + 5)
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "good.onnx").write_bytes(content)
    shutil.copytree(bundle_folder, tmp_path / "good")
    for name in PROTECTED:
        folder = tmp_path / f"changed-{name}"
        shutil.copytree(bundle_folder, folder)
        changed = bytearray((folder / name).read_bytes())
        changed[len(changed) // 2] ^= 1
        (folder / name).write_bytes(changed)
    (tmp_path / "user_data.py").write_text(USER_DATA)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "x.png")
    (tmp_path / "no.png").write_text("no image")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))

    def refused(line: str, *said: str) -> None:
        before = listing(tmp_path)
        code, out, err = command(*line.split())
        assert code == 2, err
        assert out == ""
        assert "Traceback" not in err
        told = [text for text in err.splitlines() if text.startswith("compress-uq:")]
        assert len(told) == 1
        for part in said:
            assert part in told[0]
        assert listing(tmp_path) == before

    return refused


def listing(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if "__pycache__" not in p.parts and p.is_file()}


@pytest.mark.parametrize("name", [*BROKEN, "big", "folder", "missing"])
def test_a_file_that_is_not_ours_or_not_whole(place, tmp_path, name):
    file = f"{name}.onnx"
    place(f"predict {file} x.png", file)
    place(f"evaluate {file} --data digits", file)
    place(f"verify {file}", file)
    place(f"export {file} --to triton --out repository", file)
    if name != "frozen":  # it runs, on some batches
        with pytest.raises(ArtifactError, match=file):
            cuq.OnnxPredictor(tmp_path / file)


@pytest.mark.parametrize("name", PROTECTED)
def test_a_bundle_that_was_changed(place, name):
    for line in ("predict {} x.png", "evaluate {} --data digits", "verify {}", "export {} --out y.onnx",
                 "export {} --to triton --out repository"):  # fmt: skip
        place(line.format(f"changed-{name}"), f"changed-{name}/{name}", "does not match its hash")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("predict good no.png", ["no.png"]),
        ("predict good none.png", ["none.png"]),
        ("predict good x.png --mean 0.1,0.2 --std 0.5", ["mean has 2 values"]),
        ("predict good x.png --mean a --std 0.5", ["--mean 'a'"]),
        ("predict good.onnx x.png --std 0", ["std"]),
        ("evaluate good.onnx --data user_data:colour", ["(20, 3, 8, 8)", "expected (N, 1, 8, 8)"]),
        ("evaluate good.onnx --data user_data:large", ["(20, 1, 9, 8)", "expected (N, 1, 8, 8)"]),
        ("evaluate good.onnx --data user_data:loud", ["255", "normalised"]),
        ("evaluate good.onnx --data user_data:labels", ["label 19 is out of range"]),
        ("evaluate good.onnx --data nowhere", ["nowhere"]),
        ("verify good --data user_data:colour", ["(3, 8, 8)", "(1, 8, 8)"]),
        ("verify good --data user_data:loud", ["20 test images, expected"]),
        ("verify good.onnx --data digits", ["no report card"]),
        ("export good --out no/m.onnx", ["no/m.onnx", "make it first"]),
        ("export good --out x.png/m.onnx", ["x.png/m.onnx", "make it first"]),
        ("export good --out scratch --overwrite", ["scratch", "name a file"]),
        ("export good --out /proc/m.onnx", ["/proc/m.onnx", "written"]),
        ("export good --to triton --out /proc/repository", ["/proc/repository", "written"]),
        ("export good.onnx --to triton --out x.png", ["x.png", "written"]),
        ("export good --out m.onnx --precision fp12", ["fp12"]),
    ],
)
def test_bad_images_data_and_places(place, line, said):
    place(line, *said)


def test_a_model_over_two_gigabytes_is_not_exported(place, monkeypatch):
    import compress_uq.export.graph as graph

    monkeypatch.setattr(graph, "_LIMIT", 1000)
    place("export good --out m.onnx --sampling random", "under 2 GB; prune more")


def test_a_gate_that_fails_is_one_line_too(place, monkeypatch):
    import compress_uq.export.gates as gates

    def failing(given):
        raise gates.GateError("this one")

    monkeypatch.setitem(gates.GATES, "signature", failing)
    place("export good --out m.onnx --sampling random", "gate 'signature': this one")
    place("verify good.onnx", "good.onnx", "gate 'signature': this one")
    place("export good.onnx --to triton --out repository", "good.onnx: gate 'signature'")


@pytest.fixture(scope="module")
def predictor(bundle_folder):
    return cuq.OnnxPredictor(bundle_folder / "model.onnx")


@pytest.mark.parametrize(
    ("images", "seed", "message"),
    [
        (np.zeros((2, 1, 9, 8), np.float32), None, r"\(2, 1, 9, 8\): expected \(N, 1, 8, 8\)"),
        (np.zeros((2, 3, 8, 8), np.float32), None, r"\(2, 3, 8, 8\): expected"),
        (np.zeros((1, 8, 8), np.float32), None, r"\(1, 8, 8\): expected"),
        (np.zeros((0, 1, 8, 8), np.float32), None, "no image"),
        (np.zeros((2, 1, 8, 8), np.uint8), None, "dtype uint8: expected float32"),
        (np.zeros((2, 1, 8, 8), object), None, "dtype object: expected float32"),
        (np.full((2, 1, 8, 8), 255, np.float32), None, "images reach 255: expected them normalised"),
        (np.full((2, 1, 8, 8), np.nan, np.float32), None, "NaN"),
        (np.full((2, 1, 8, 8), np.inf, np.float32), None, "infinite"),
        ([[1, 2], [3]], None, "images"),
        (np.zeros((2, 1, 8, 8), np.float32), [1, 2], "no seed"),
    ],
)
def test_bad_arrays(predictor, images, seed, message):
    with pytest.raises(InputError, match=message) as error:
        predictor(images, seed)
    assert "\n" not in str(error.value)


def test_bad_seeds(bundle_folder, tmp_path):
    cuq.Bundle.load(bundle_folder).export_onnx(tmp_path / "s.onnx", sampling="seeded")
    seeded, x = cuq.OnnxPredictor(tmp_path / "s.onnx"), np.zeros((2, 1, 8, 8), np.float32)
    for seed, message in ((None, "a seed per image"), ([1], "one per image"), ([0.5, 1], "dtype float64"),
                          (7, "one per image"), (["a", "b"], "expected int64")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            seeded(x, seed)


def test_a_file_that_cannot_run_a_batch(bundle_folder, tmp_path):
    (tmp_path / "f.onnx").write_bytes(frozen((bundle_folder / "model.onnx").read_bytes()))
    with pytest.raises(ArtifactError, match=r"f.onnx cannot be run on 2 images") as error:
        cuq.OnnxPredictor(tmp_path / "f.onnx")(np.zeros((2, 1, 8, 8), np.float32))
    assert "\n" not in str(error.value)


def test_a_provider_that_is_not_there_or_does_not_start(bundle_folder, monkeypatch):
    import compress_uq.runtime as runtime

    file = bundle_folder / "model.onnx"
    with pytest.raises(MissingDependencyError, match="'NoSuchProvider' is not there: onnxruntime has .*CPU"):
        cuq.OnnxPredictor(file, providers=["NoSuchProvider"])

    # onnxruntime goes on without a provider whose libraries are missing, and only logs it.
    real = runtime.onnxruntime.InferenceSession
    monkeypatch.setattr(
        runtime.onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(
        runtime.onnxruntime,
        "InferenceSession",
        lambda m, o, providers, **_: real(m, o, providers=["CPUExecutionProvider"]),
    )
    with pytest.raises(MissingDependencyError, match="'CUDAExecutionProvider' is installed and does not start"):
        cuq.OnnxPredictor(file, providers=["CUDAExecutionProvider"])
    assert cuq.OnnxPredictor(file, providers=["CUDAExecutionProvider", "CPUExecutionProvider"]).image_shape == (1, 8, 8)


def test_a_file_that_may_not_be_read(bundle_folder, tmp_path, monkeypatch):
    (tmp_path / "m.onnx").write_bytes(b"x")

    def denied(self):
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr("pathlib.Path.read_bytes", denied)
    with pytest.raises(ArtifactError, match=r"m.onnx cannot be read: Permission denied"):
        cuq.OnnxPredictor(tmp_path / "m.onnx")
