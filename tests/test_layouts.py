"""Samples folded into the batch or as branches: the same answers, their cost, and which of the two is taken."""

import json
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import compress_uq as cuq
from compress_uq.cost import Cost, count_macs
from compress_uq.data import ImageTensors
from compress_uq.errors import GateError, InputError, UnknownNameError
from compress_uq.export import costs, onnx_file
from compress_uq.export.body import FEATURES, LOGITS
from compress_uq.export.gates import check_graph
from compress_uq.export.graph_cost import GraphCost, graph_cost
from compress_uq.export.layouts import FloatImages
from compress_uq.export.member_layouts import Unroll
from compress_uq.export.parts import split_model
from compress_uq.footprint import parse_bytes, peak_of_process
from compress_uq.runtime import OnnxPredictor, session
from compress_uq.stages import Origin
from compress_uq.types import OUTPUT_NAMES
from compress_uq.uncertain import UncertainModel
from compress_uq.uq import MSP, MCDropout, Networks, Trained
from small_models import InnerDropout, randomise

SHAPE = (1, 8, 8)
ORIGIN = Origin(SHAPE, Cost(1, 10**12, 1), tuple("abcd"), (0.5,), (0.25,))
MEMBERS = 5


def sampled(network, origin=ORIGIN, **options) -> UncertainModel:
    method = MCDropout(p=0.2, samples=MEMBERS, **options)
    return UncertainModel(method.fit(Trained((network,), origin)), method, origin)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    made = randomise(cuq.build_model("compress-uq:cnn", num_classes=4, input_shape=SHAPE, options={"widths": [16, 16]}))
    made[-1].weight.data *= 5
    return made.eval()


@pytest.fixture(scope="module")
def model(network) -> UncertainModel:
    return sampled(network)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    made = tmp_path_factory.mktemp("layouts")
    for layout, sampling in (("fold", "fixed"), ("unroll", "fixed"), ("unroll", "seeded"), ("unroll", "random")):
        cuq.export_onnx(model, made / f"{layout}-{sampling}.onnx", layout=layout, sampling=sampling)
    return made


def images(count=6, shape=SHAPE):
    return np.random.default_rng(0).normal(size=(count, *shape)).astype(np.float32)


def same(got, wanted, tolerance=1e-5):
    for name in OUTPUT_NAMES:
        assert np.allclose(getattr(got, name), getattr(wanted, name), atol=tolerance), name


def test_branches_answer_as_the_fold(model, folder):
    x = images()
    same(OnnxPredictor(folder / "unroll-fixed.onnx")(x), OnnxPredictor(folder / "fold-fixed.onnx")(x))
    seeds = np.array([0, 7, -1, 2**62, -(2**62), 7])
    seeded = model.but(members=model.members.with_sampling("seeded"))
    with torch.no_grad():
        wanted = seeded(torch.from_numpy(x), torch.from_numpy(seeds))
    same(OnnxPredictor(folder / "unroll-seeded.onnx")(x, seeds), wanted)


def test_branches_draw_anew_for_every_site_member_and_call(folder):
    predictor = OnnxPredictor(folder / "unroll-random.onnx")
    x = np.repeat(images(1), 400, 0)
    one, two = predictor(x), predictor(x)
    assert not np.allclose(one.mutual_information, two.mutual_information)
    fixed = OnnxPredictor(folder / "fold-fixed.onnx")(x[:1])
    assert one.mutual_information.mean() == pytest.approx(float(fixed.mutual_information[0]), rel=0.6)
    draws = [n.output[0] for n in onnx.load(folder / "unroll-random.onnx").graph.node if n.op_type.startswith("Random")]
    assert len(draws) == 2, "one for each site, whatever the exporter merges"


def test_the_trunk_and_the_weights_are_there_once(folder):
    def counts(name):
        proto = onnx.load(folder / f"{name}-fixed.onnx")
        assert json.loads({p.key: p.value for p in proto.metadata_props}["compress_uq.layout"]) == name
        stored = sum(len(t.raw_data) for t in proto.graph.initializer if not t.name.startswith("masks_"))
        return sum(n.op_type == "Conv" for n in proto.graph.node), stored

    assert counts("fold")[0] == 2
    convolutions, stored = counts("unroll")
    assert convolutions == 1 + MEMBERS
    assert stored == pytest.approx(counts("fold")[1], rel=0.1)


def test_branches_that_drop_the_same_fail_a_gate(model, folder):
    proto = onnx.load(folder / "unroll-fixed.onnx")
    for node in proto.graph.node:
        for place, name in enumerate(node.input):
            if name.startswith("masks_"):
                node.input[place] = name.partition("/")[0] + "/0"
    with pytest.raises(GateError, match="'parity'|'members'"):
        check_graph(proto.SerializeToString(), model)


def test_what_a_skip_connection_carries_is_not_repeated():
    torch.manual_seed(0)
    origin = Origin((3, 8, 8), Cost(1, 10**12, 1))
    skipped = sampled(randomise(InnerDropout()), origin)
    whole = {name: graph(skipped, name) for name in ("fold", "unroll")}
    stem, last, head = 64 * 16 * 27, 64 * 16 * 16, 16 * 5
    assert graph_cost(whole["unroll"], 1).macs == stem + 64 * 16 * 16 * 9 + MEMBERS * (last + head)
    assert graph_cost(whole["unroll"], 1).macs < graph_cost(whole["fold"], 1).macs
    x = images(3, (3, 8, 8))
    got, wanted = (session(p.SerializeToString()).run(None, {"images": x}) for p in whole.values())
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(got, wanted, strict=True))


def graph(model, layout):
    drafts = onnx_file._drafts(model, "fixed", onnx_file.PRECISIONS["fp32"](), FloatImages, None, None)
    return drafts.whole(drafts.body(layout))


@pytest.mark.parametrize("kind", ["connection", "element"])
def test_branches_of_other_kinds_of_dropout(network, kind, tmp_path):
    dropped = sampled(network, kind=kind, at=("3",) if kind == "element" else ("9",))
    cuq.export_onnx(dropped, tmp_path / "m.onnx", layout="unroll")  # the gates compare it with torch
    assert OnnxPredictor(tmp_path / "m.onnx")(images()).mutual_information.max() > 1e-4


def test_features_of_branches_are_their_mean(model):
    x = images()
    looked_at = SimpleNamespace(
        score=SimpleNamespace(of_features=True), ood_score=None, members=model.members, origin=ORIGIN
    )
    layout = Unroll()
    made = session(layout.finish(layout.trace(model.members, looked_at, FloatImages()), looked_at).SerializeToString())
    got = dict(zip((LOGITS, FEATURES), made.run(None, {"images": x}), strict=True))
    with torch.no_grad():
        logits, features = model.members.with_features(torch.from_numpy(x))
    assert np.allclose(got[LOGITS], logits.numpy(), atol=1e-4)
    assert np.allclose(got[FEATURES], features.numpy(), atol=1e-4)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_branches_in_short_numbers(model, folder, precision, tmp_path):
    pixels = torch.randint(0, 256, (120, *SHAPE), dtype=torch.uint8)
    splits = cuq.Splits(calibration=ImageTensors(pixels, torch.arange(120) % 4, (0.5,), (0.25,)))
    result = cuq.export_onnx(model, tmp_path / "m.onnx", precision=precision, layout="unroll", splits=splits)
    assert result.layout == "unroll"
    assert result.gates["precision"].endswith("float32 from the logits on")
    x = images(64)
    got, wanted = (OnnxPredictor(p)(x) for p in (tmp_path / "m.onnx", folder / "unroll-fixed.onnx"))
    assert (got.label == wanted.label).mean() > 0.9
    if precision == "int8":
        kinds = [n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node]
        assert kinds.count("Conv") == 1 + MEMBERS
        assert "QuantizeLinear" in kinds


# Which layout is taken.


@pytest.fixture
def made_up(monkeypatch):
    """Times and memory that are not measured."""

    def set_to(fold, unroll, memory=None):
        times = {"fold": fold, "unroll": unroll}
        monkeypatch.setattr(costs, "interleaved_milliseconds", lambda runs, **_: {n: times[n] for n in runs})
        sizes = iter(memory or ())
        monkeypatch.setattr(costs, "peak_of_file", lambda *_: next(sizes))

    return set_to


def chosen(folder, most_bytes=None) -> costs.CostTable:
    files = {name: onnx.load(folder / f"{name}-fixed.onnx") for name in ("fold", "unroll")}
    return costs.measure_layouts(files, parts=None, memory=False, most_bytes=most_bytes, asked=False)


def test_the_cheaper_layout_is_taken(model, made_up, folder, tmp_path):
    for fold, unroll, taken in ((1.0, 0.9, "unroll"), (1.0, 0.97, "fold"), (1.0, 1.5, "fold")):
        made_up(fold, unroll)
        table = chosen(folder)
        assert table.chosen == taken, (fold, unroll)
        assert f"{unroll:.2f}" in table.reason
    made_up(1.0, 0.5)
    result = cuq.export_onnx(model, tmp_path / "m.onnx")
    assert result.layout == "unroll"
    assert OnnxPredictor(tmp_path / "m.onnx").metadata["layout"] == "unroll"


def test_memory_decides_before_time(model, made_up, folder, tmp_path):
    made_up(1.0, 2.0, memory=(3 * 10**8, 10**8))
    table = chosen(folder, 2 * 10**8)
    assert table.chosen == "unroll"
    assert table.reason == "fold needs 300 MB"
    made_up(1.0, 2.0, memory=(3 * 10**8, 10**9))
    with pytest.raises(InputError, match="200 MB: fold needs 300 MB and unroll needs 1.00 GB at batch 32"):
        cuq.export_onnx(model, tmp_path / "m.onnx", max_memory="200MB")
    assert not (tmp_path / "m.onnx").exists()


def test_costs_before_anything_is_written(model):
    table = cuq.layout_costs(model)
    fold, unroll = table.layouts
    assert fold.macs == unroll.macs == count_macs(model, torch.zeros(1, *SHAPE))
    assert set(fold.measured_ms) == set(fold.estimated_ms) == {1, 32}
    assert min(*fold.measured_ms.values(), *fold.estimated_ms.values(), *unroll.estimated_ms.values()) > 0
    assert 2 * 10**7 < fold.peak_bytes < 10**9
    assert len(table.columns) == len(table.rows()[0])
    assert json.dumps(table.to_json())


def test_names_of_layouts(model, network, tmp_path):
    path = tmp_path / "m.onnx"
    with pytest.raises(UnknownNameError, match="unknown layout 'folded': did you mean 'fold'"):
        cuq.export_onnx(model, path, layout="folded")
    single = UncertainModel(MSP().fit(Trained((network,), ORIGIN)), MSP(), ORIGIN)
    with pytest.raises(InputError, match="'unroll': msp is laid out as fold"):
        cuq.export_onnx(single, path, layout="unroll")
    several = UncertainModel(Networks((network, randomise(network))), MSP(), ORIGIN)
    with pytest.raises(InputError, match="laid out as unroll"):
        cuq.export_onnx(several, path, layout="fold")
    with pytest.raises(InputError, match="memory 'lots'"):
        cuq.export_onnx(model, path, max_memory="lots")
    assert not path.exists()


def test_sizes():
    given = {"900MB": 900 * 10**6, "1.5 GiB": 3 * 2**29, "7": 7, 12: 12, "64kb": 64_000}
    assert {text: parse_bytes(text) for text in given} == given
    for wrong in ("", "MB", "-1MB", "0", "nan", "inf", "3 parsecs"):
        with pytest.raises(InputError):
            parse_bytes(wrong)


def test_memory_is_that_of_another_process():
    ballast = bytearray(300_000_000)
    ballast[::4096] = b"x" * len(ballast[::4096])
    small = peak_of_process("pass")
    assert small < 200_000_000 < len(ballast)
    assert peak_of_process("b = bytearray(200_000_000); b[::4096] = b'x' * len(b[::4096])") > small + 190_000_000
    with pytest.raises(GateError, match="ValueError: no"):
        peak_of_process("raise ValueError('no')")


# Counts and cuts.


def test_cost_of_a_graph_by_hand():
    value = helper.make_tensor_value_info
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 1, 3, 3], [0.0] * 36)
    matrix = helper.make_tensor("m", TensorProto.FLOAT, [4 * 64, 2], [0.0] * 512)
    shape = helper.make_tensor("s", TensorProto.INT64, [2], [-1, 256])
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Reshape", ["r", "s"], ["f"]),
        helper.make_node("MatMul", ["f", "m"], ["y"]),
    ]
    inputs = [value("x", TensorProto.FLOAT, ["N", 1, 8, 8])]
    made = helper.make_graph(nodes, "g", inputs, [value("y", TensorProto.FLOAT, ["N", 2])], [weight, matrix, shape])
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)])
    two_maps = 2 * 4 * 64 * 4
    assert graph_cost(proto, 1) == GraphCost(64 * 4 * 9 + 256 * 2, 4 * (36 + 512) + 16, two_maps)
    assert graph_cost(proto, 3).macs == 3 * (64 * 4 * 9 + 512)
    assert graph_cost(proto, 3).activation_bytes == 3 * two_maps


def test_the_parts_are_the_plain_network(model, network):
    parts = split_model(model)
    x = images()
    trunk, tail = session(parts.trunk), session(parts.tail)
    carried = trunk.run(None, {"images": x})
    (logits,) = tail.run(None, {i.name: v for i, v in zip(tail.get_inputs(), carried, strict=True)})
    with torch.no_grad():
        assert np.allclose(logits[0], network(torch.from_numpy(x)).numpy(), atol=1e-4)
    assert "Mul" not in {n.op_type for n in onnx.load_from_string(parts.tail).graph.node}
    single = UncertainModel(MSP().fit(Trained((network,), ORIGIN)), MSP(), ORIGIN)
    assert split_model(single) is None


# The command line.


def test_export_shows_the_cost_and_keeps_the_limit(command, bundle_folder, tmp_path):
    out = tmp_path / "unrolled.onnx"
    code, printed, err = command("export", bundle_folder, "--out", out, "--layout", "unroll", "--json")
    assert code == 0
    assert "estimated ms (32)" in err
    assert "layout unroll: asked for" in err
    content = json.loads(printed)
    assert content["layout"] == "unroll"
    assert content["costs"]["layouts"][0]["measured_ms"]["32"] > 0
    code, _, err = command("export", bundle_folder, "--out", tmp_path / "no.onnx", "--max-memory", "1MB")
    assert code == 2
    assert err.strip().splitlines()[-1].startswith("compress-uq: --max-memory (max_memory=) 1 MB: fold")
    assert not (tmp_path / "no.onnx").exists()
