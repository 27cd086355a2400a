"""The exported file: parity with torch, sampling modes, metadata, threads."""

import copy
import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

import compress_uq as cuq
from compress_uq.errors import ArtifactError, GateError, UncertaintyError
from compress_uq.export.gates import GATES
from compress_uq.export.graph import to_graph
from compress_uq.runtime import OnnxPredictor
from compress_uq.stages import Origin
from compress_uq.types import OUTPUT_NAMES
from compress_uq.uncertain import UncertainModel
from compress_uq.uq import MSP, Networks, Trained
from small_models import own, uncertain_cnn

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def uncertain() -> UncertainModel:
    return uncertain_cnn()


@pytest.fixture(scope="module")
def files(uncertain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    for sampling in ("fixed", "seeded", "random"):
        cuq.export_onnx(uncertain, folder / f"{sampling}.onnx", sampling=sampling)
    return folder


@pytest.fixture(scope="module")
def content(files) -> bytes:
    return (files / "fixed.onnx").read_bytes()


def images(count=6, seed=0):
    return np.random.default_rng(seed).normal(size=(count, *SHAPE)).astype(np.float32)


def test_fixed_file_answers_as_torch(uncertain, files):
    x = images()
    got = OnnxPredictor(files / "fixed.onnx")(x)
    with torch.no_grad():
        wanted = uncertain(torch.from_numpy(x))
    for name in OUTPUT_NAMES:
        a, b = getattr(got, name), getattr(wanted, name).numpy()
        assert a.dtype == b.dtype == (np.int64 if name == "label" else np.float32)
        assert np.allclose(a, b, atol=1e-5), name
    assert got.accepted is None
    assert got.mutual_information.max() > 1e-3


def test_seeded_file_is_reproducible_and_independent_of_the_batch(uncertain, files):
    predictor = OnnxPredictor(files / "seeded.onnx")
    x, seeds = images(), np.array([0, 7, -1, 2**62, -(2**62), 7])
    a = predictor(x, seeds)
    assert np.array_equal(a.probabilities, predictor(x, seeds).probabilities)
    assert np.allclose(a.probabilities[3:4], predictor(x[3:4], seeds[3:4]).probabilities, atol=1e-6)
    assert np.allclose(a.probabilities[::-1], predictor(x[::-1], seeds[::-1]).probabilities, atol=1e-6)
    assert not np.allclose(a.mutual_information, predictor(x, seeds + 1).mutual_information, atol=1e-6)
    seeded = copy.deepcopy(uncertain)
    seeded.members = seeded.members.with_sampling("seeded")
    with torch.no_grad():
        wanted = seeded(torch.from_numpy(x), torch.from_numpy(seeds))
    assert np.allclose(a.probabilities, wanted.probabilities.numpy(), atol=1e-5)
    # Over many seeds the members average to what the fixed masks average to.
    many = predictor(np.repeat(x[:1], 2000, 0), np.arange(2000))
    assert len(np.unique(many.variance)) > 500


def test_random_file_draws_anew(files):
    predictor = OnnxPredictor(files / "random.onnx")
    assert not np.array_equal(predictor(images()).probabilities, predictor(images()).probabilities)


def test_the_default_file_keeps_its_promises(files, content):
    model = onnx.load_from_string(content)
    onnx.checker.check_model(model, full_check=True)
    assert {o.domain: o.version for o in model.opset_import} == {"": 18}
    assert {n.op_type for n in model.graph.node}.isdisjoint(
        {"Dropout", "Bernoulli", "RandomUniformLike", "Loop", "If", "Scan"}
    )
    recorded = OnnxPredictor(files / "fixed.onnx").metadata
    assert recorded["labels"] == ["a", "b", "c", "d"]
    assert recorded["input"]["mean"] == [0.5]
    assert (recorded["method"], recorded["samples"], recorded["sampling"]) == ("mc-dropout", 5, "fixed")
    assert list((files).iterdir())  # one file each, no external data beside them
    assert {f.suffix for f in files.iterdir()} == {".onnx"}


def test_tails_are_computed_for_all_members_and_the_trunk_once(content):
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(content), data_prop=True)
    assert sum(n.op_type == "Conv" for n in model.graph.node) == 2


def test_a_file_that_fails_a_gate_is_not_left(uncertain, tmp_path, monkeypatch):
    import compress_uq.export.onnx_file as module

    monkeypatch.setattr(
        module,
        "to_graph",
        lambda model, described, layout: to_graph(doubled, described, layout),
    )
    doubled = uncertain.but()
    with torch.no_grad():
        doubled.members.networks[0][-1].weight.mul_(2)
    (tmp_path / "m.onnx").write_bytes(b"earlier")
    with pytest.raises(GateError, match="'parity'"):
        cuq.export_onnx(uncertain, tmp_path / "m.onnx")
    assert [f.name for f in tmp_path.iterdir()] == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_bytes() == b"earlier"


def test_members_without_effect_are_an_error(uncertain, tmp_path):
    alike = copy.deepcopy(uncertain)
    for masked in alike.members.masked:
        masked.masks.fill_(1.0)
    with pytest.raises(GateError, match="all alike"):
        cuq.export_onnx(alike, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_sampling_where_nothing_is_sampled(tmp_path):
    origin = Origin(SHAPE)
    plain = UncertainModel(MSP().fit(Trained((own("cnn", SHAPE, widths=(8,)),), origin)), MSP(), origin)
    with pytest.raises(UncertaintyError, match="nothing is sampled"):
        cuq.export_onnx(plain, tmp_path / "m.onnx", sampling="seeded")
    cuq.export_onnx(plain, tmp_path / "m.onnx")
    assert OnnxPredictor(tmp_path / "m.onnx")(images()).mutual_information.tolist() == [0] * 6


def test_bad_export_arguments(uncertain, tmp_path):
    with pytest.raises(UncertaintyError, match="'often'"):
        cuq.export_onnx(uncertain, tmp_path / "m.onnx", sampling="often")
    with pytest.raises(ArtifactError, match="fit_uncertainty first"):
        cuq.export_onnx(nn.Linear(2, 2), tmp_path / "m.onnx")
    with pytest.raises(ArtifactError, match="is not there"):
        cuq.export_onnx(uncertain, tmp_path / "no" / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_clashing_onnxruntime_packages_are_told(monkeypatch, files):
    import compress_uq.runtime as runtime

    monkeypatch.setattr(runtime, "_is_installed", lambda name: True)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(cuq.errors.MissingDependencyError, match="pip uninstall"):
        OnnxPredictor(files / "fixed.onnx")


def test_threads_share_one_predictor(files):
    from concurrent.futures import ThreadPoolExecutor

    predictor = OnnxPredictor(files / "fixed.onnx", threads=1)
    batches = [images(1 + seed % 7, seed) for seed in range(60)]
    alone = [predictor(b).probabilities for b in batches]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda b: predictor(b).probabilities, batches))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_metadata_is_json(content):
    for entry in onnx.load_from_string(content).metadata_props:
        json.loads(entry.value)


def test_any_members_export(tmp_path):
    members = Networks([nn.Sequential(nn.Flatten(), nn.Linear(64, 3)) for _ in range(2)], head="1")
    model = UncertainModel(members, MSP(), Origin(SHAPE))
    result = cuq.export_onnx(model, tmp_path / "m.onnx")
    assert list(result.gates) == list(GATES)
