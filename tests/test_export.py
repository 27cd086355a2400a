"""The exported file: parity with torch, sampling modes, and a trap for every gate."""

import copy
import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import compress_uq as cuq
from compress_uq.cost import Cost
from compress_uq.errors import ArtifactError, GateError, InputError, UncertaintyError
from compress_uq.export.gates import GATES, check_graph
from compress_uq.export.graph import describe, to_graph
from compress_uq.runtime import OnnxPredictor
from compress_uq.stages import Origin
from compress_uq.types import OUTPUT_NAMES
from compress_uq.uncertain import UncertainModel, summarise
from compress_uq.uq import MSP, MCDropout, Networks, Trained
from small_models import own, randomise

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def uncertain() -> UncertainModel:
    torch.manual_seed(0)
    origin = Origin(SHAPE, Cost(1, 10**12, 1), ("a", "b", "c", "d"), (0.5,), (0.25,))
    model = randomise(
        cuq.build_model("compress-uq:cnn", num_classes=4, input_shape=SHAPE, options={"widths": [16, 16]})
    )
    model[-1].weight.data *= 5
    method = MCDropout(p=0.2, samples=5)
    return UncertainModel(method.fit(Trained((model,), origin)), method, origin)


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


class Trap(UncertainModel):
    """An uncertain model whose forward pass is made wrong on purpose."""

    def __init__(self, good: UncertainModel, spoil) -> None:
        super().__init__(good.members, good.method, good.origin)
        self.spoil = spoil

    def forward(self, images, seed=None):
        return self.spoil(self, images)


def spoiled(uncertain, spoil) -> bytes:
    trap = Trap(uncertain, spoil)
    return to_graph(trap, describe(uncertain, None)).SerializeToString()


def test_gate_against_dependence_on_the_batch(uncertain):
    def mean_of_batch(model, x):
        return summarise(model.members(x - x.mean(0, keepdim=True)))

    with pytest.raises(GateError, match="'batch'"):
        check_graph(spoiled(uncertain, mean_of_batch), Trap(uncertain, mean_of_batch))


def test_gate_against_dependence_on_the_place(uncertain):
    def by_place(model, x):
        return summarise(model.members(x + torch.cumsum(torch.ones_like(x), 0)))

    with pytest.raises(GateError, match="'batch'"):
        check_graph(spoiled(uncertain, by_place), Trap(uncertain, by_place))


def test_gate_against_merged_members(uncertain):
    def merged(model, x):
        logits = model.members(x)
        return summarise(logits.mean(0, keepdim=True).expand(5, -1, -1))

    with pytest.raises(GateError, match=r"'(members|parity)'"):
        check_graph(spoiled(uncertain, merged), uncertain)
    with pytest.raises(GateError, match="'members'"):
        check_graph(spoiled(uncertain, merged), None)


def test_gate_against_another_answer_than_torch(uncertain):
    with pytest.raises(GateError, match="'parity'"):
        check_graph(spoiled(uncertain, lambda m, x: summarise(m.members(x) * 1.1)), uncertain)


def edited(content: bytes, edit) -> bytes:
    model = onnx.load_from_string(content)
    edit(model)
    return model.SerializeToString()


def insert_after_first(model, nodes):
    first = model.graph.node[0]
    old = first.output[0]
    first.output[0] = "before_trap"
    for number, node in enumerate(nodes(old)):
        model.graph.node.insert(1 + number, node)


@pytest.mark.parametrize("operator", ["Dropout", "Bernoulli", "RandomNormalLike"])
def test_gate_against_operators_that_are_random_or_vanish(content, operator):
    def put_in(model):
        insert_after_first(model, lambda out: [helper.make_node(operator, ["before_trap"], [out])])

    with pytest.raises(GateError, match="'operators'"):
        check_graph(edited(content, put_in), None)


def test_gate_against_training_mode_dropout_as_a_user_would_bring_it(uncertain):
    def loop_over_dropout(model, x):
        members = [nn.functional.dropout(model.members(x)[0], 0.5, training=True) for _ in range(5)]
        return summarise(torch.stack(members))

    with pytest.raises(GateError, match="'operators'"):
        check_graph(spoiled(uncertain, loop_over_dropout), None)


def test_gate_against_control_flow(content):
    def put_in(model):
        branch = helper.make_graph(
            [helper.make_node("Identity", ["before_trap"], ["branch_out"])], "b", [],
            [helper.make_tensor_value_info("branch_out", TensorProto.FLOAT, None)],
        )  # fmt: skip
        condition = helper.make_node("Constant", [], ["c"], value=helper.make_tensor("v", TensorProto.BOOL, [], [True]))
        insert_after_first(
            model,
            lambda out: [condition, helper.make_node("If", ["c"], [out], then_branch=branch, else_branch=branch)],
        )

    with pytest.raises(GateError, match="'operators'.*If"):
        check_graph(edited(content, put_in), None)


def test_gate_against_another_opset(content):
    def newer(model):
        model.opset_import[0].version = 22

    with pytest.raises(GateError, match="opsets"):
        check_graph(edited(content, newer), None)


def test_gate_against_a_frozen_batch(content):
    def freeze(model):
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 5

    with pytest.raises(GateError, match="'signature'"):
        check_graph(edited(content, freeze), None)


def test_gate_against_paths(content, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def leak(model):
        model.graph.node[0].doc_string = f"made in {tmp_path}/model.py"

    with pytest.raises(GateError, match="'one file'.*path"):
        check_graph(edited(content, leak), None)


def test_gate_against_tensors_in_another_file(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def move_out(model):
        tensor = model.graph.initializer[0]
        (tmp_path / "weights.bin").write_bytes(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", "weights.bin"

    with pytest.raises(GateError, match=r"'(one file|loads)'"):
        check_graph(edited(content, move_out), None)


def test_a_file_that_fails_a_gate_is_not_left(uncertain, tmp_path, monkeypatch):
    import compress_uq.export.onnx_file as module

    monkeypatch.setattr(
        module,
        "to_graph",
        lambda *a: onnx.load_from_string(spoiled(uncertain, lambda m, x: summarise(m.members(x) * 2))),
    )
    (tmp_path / "m.onnx").write_bytes(b"earlier")
    with pytest.raises(GateError):
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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: images()[:, :, :4], "expected \\(N, 1, 8, 8\\)"),
        (lambda: images()[0], "expected"),
        (lambda: (images() * 255).astype(np.uint8), "dtype uint8"),
        (lambda: np.full((1, *SHAPE), np.nan, np.float32), "NaN"),
    ],
)
def test_predictor_refuses_bad_images(files, wrong, message):
    with pytest.raises(InputError, match=message):
        OnnxPredictor(files / "fixed.onnx")(wrong())


def test_predictor_refuses_missing_and_needless_seeds(files):
    with pytest.raises(InputError, match="a seed per image"):
        OnnxPredictor(files / "seeded.onnx")(images())
    with pytest.raises(InputError, match="no seed"):
        OnnxPredictor(files / "fixed.onnx")(images(), np.arange(6))
    with pytest.raises(InputError, match="one per image"):
        OnnxPredictor(files / "seeded.onnx")(images(), np.arange(5))


def test_predictor_refuses_foreign_and_damaged_files(content, tmp_path):
    (tmp_path / "cut.onnx").write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtifactError, match="cut.onnx"):
        OnnxPredictor(tmp_path / "cut.onnx")
    with pytest.raises(ArtifactError, match="no such file"):
        OnnxPredictor(tmp_path / "none.onnx")
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "g",
        [value("x", TensorProto.FLOAT, ["N", 2])], [value("y", TensorProto.FLOAT, ["N", 2])],
    )  # fmt: skip
    foreign = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    (tmp_path / "foreign.onnx").write_bytes(foreign.SerializeToString())
    with pytest.raises(ArtifactError, match="not exported by compress-uq"):
        OnnxPredictor(tmp_path / "foreign.onnx")
    with pytest.raises(ArtifactError, match="not exported by compress-uq"):
        cuq.verify(tmp_path / "foreign.onnx")


def test_predictor_names_a_provider_that_is_not_there(files):
    with pytest.raises(cuq.errors.MissingDependencyError, match="CPUExecutionProvider"):
        OnnxPredictor(files / "fixed.onnx", providers=["NoSuchProvider"])


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
