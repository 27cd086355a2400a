"""Every gate and the traps that it closes: each trap is a file made with that fault, and with its gates gone it passes."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.utils.data import TensorDataset

import compress_uq as cuq
import compress_uq.export.gates as gates
from compress_uq.errors import ArtifactError, GateError
from compress_uq.export.body import LOGITS, assemble, body_graph
from compress_uq.export.gates import GATES, check_graph
from compress_uq.export.graph import describe, to_graph
from compress_uq.export.layouts import FloatImages
from compress_uq.runtime import quantisation_tools
from compress_uq.uncertain import UncertainModel, summarise
from small_models import uncertain_cnn

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def uncertain() -> UncertainModel:
    return uncertain_cnn()


@pytest.fixture(scope="module")
def images() -> cuq.Splits:
    generator = torch.Generator().manual_seed(1)
    return cuq.Splits(calibration=TensorDataset(torch.randn(64, *SHAPE, generator=generator), torch.arange(64) % 4))


@pytest.fixture(scope="module")
def files(uncertain, images, tmp_path_factory) -> dict[str, bytes]:
    """Good files, by the form that they were exported in."""
    path = tmp_path_factory.mktemp("gates") / "m.onnx"
    forms = {
        "fixed": {}, "random": {"sampling": "random"}, "fp16": {"precision": "fp16"},
        "int8": {"precision": "int8", "splits": images},
    }  # fmt: skip
    made = {}
    for name, options in forms.items():
        cuq.export_onnx(uncertain, path, **options)
        made[name] = path.read_bytes()
    return made


# What is done to a graph.


def insert(graph, place: str, *nodes: Callable[[str, str], onnx.NodeProto]) -> None:
    """Put nodes behind the one that gives the tensor `place`; each is made from the names of its input and output."""
    number, maker = next((i, node) for i, node in enumerate(graph.node) if place in node.output)
    names = [f"trap_{i}" for i in range(len(nodes))] + [place]
    maker.output[list(maker.output).index(place)] = names[0]
    for i, node in enumerate(nodes):
        graph.node.insert(number + 1 + i, node(names[i], names[i + 1]))


def store(graph, name: str, values) -> str:
    graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
    return name


def tensor(graph, name: str):
    return next(t for t in graph.initializer if t.name == name)


def operator(kind, *more, **options):
    return lambda got, gives: helper.make_node(kind, [got, *more], [gives], f"trap_node_{gives}", **options)


def record(proto, key, value):
    entry = next((e for e in proto.metadata_props if e.key == f"compress_uq.{key}"), None) or proto.metadata_props.add()
    entry.key, entry.value = f"compress_uq.{key}", json.dumps(value)


def training_dropout(proto):
    store(proto.graph, "rate", np.float32(0.2)), store(proto.graph, "training", np.bool_(True))
    insert(proto.graph, "relu", operator("Dropout", "rate", "training"))


def bernoulli(proto):
    """The mask as `torch.bernoulli` brings it: onnxruntime draws 1 with probability 1 - p."""
    graph = proto.graph
    zero, keep = store(graph, "zero", np.float32(0)), store(graph, "keep", np.float32(0.8))
    for number, node in reversed(list(enumerate(graph.node))):
        if node.op_type == "Greater":
            name = node.output[0]
            chances = helper.make_node("Mul", [node.input[0], zero], [f"{name}_zeros"], f"{name}_1")
            kept = helper.make_node("Add", [f"{name}_zeros", keep], [f"{name}_keep"], f"{name}_2")
            drawn = helper.make_node("Bernoulli", [f"{name}_keep"], [name], f"{name}_3", dtype=TensorProto.FLOAT)
            del graph.node[number]
            for new in (drawn, kept, chances):
                graph.node.insert(number, new)


def inverted(proto):
    """The same mistake in operators that are allowed: what was to be kept is dropped."""
    for node in proto.graph.node:
        if node.op_type == "Greater":
            node.op_type = "LessOrEqual"


def newer_opset(proto):
    proto.opset_import[0].version = 22


def no_cuda_kernel(proto):
    insert(proto.graph, "relu", operator("Atan"), operator("Tan"))


def custom_operator(proto):
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    insert(proto.graph, "relu", operator("Gelu", domain="com.microsoft"))


def control_flow(proto):
    gives = helper.make_tensor_value_info("branch_out", TensorProto.FLOAT, None)
    branch = helper.make_graph([helper.make_node("Identity", ["trap_0"], ["branch_out"])], "b", [], [gives])
    store(proto.graph, "always", np.bool_(True))

    def choice(_got, out):
        return helper.make_node("If", ["always"], [out], "choice", then_branch=branch, else_branch=branch)

    insert(proto.graph, "relu", choice)


def function(proto):
    proto.functions.append(
        helper.make_function(
            "f", "F", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"])], [helper.make_opsetid("", 18)]
        )
    )


def outside(stored):
    """A tensor in a file beside the model, as the exporter writes it by default."""
    stored.ClearField("raw_data")
    stored.data_location = TensorProto.EXTERNAL
    entry = stored.external_data.add()
    entry.key, entry.value = "location", "weights.bin"


def external_weight(proto):
    outside(tensor(proto.graph, "unsqueeze_1"))


def external_constant(proto):
    values = numpy_helper.from_array(np.ones(1, np.float32), "one")
    outside(values)
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["one"], "constant", value=values))


def stack_trace(proto):
    entry = proto.graph.node[0].metadata_props.add()
    entry.key, entry.value = "pkg.torch.onnx.stack_trace", 'File "/mnt/lab/train.py", line 12, in forward'


def own_folder(proto):
    proto.graph.node[0].doc_string = f"made in {os.getcwd()}"


def frozen_name(proto):
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 5


def frozen_inside(proto):
    """The inputs and outputs promise any batch, and a reshape in between does not keep it."""
    store(proto.graph, "five", np.array([5, 1, 16, 4, 4]))
    insert(proto.graph, "unsqueeze", operator("Reshape", "five"), operator("Reshape", "as_before"))
    store(proto.graph, "as_before", np.array([1, -1, 16, 4, 4]))


def outputs_turned(proto):
    first, second = (o for o in proto.graph.output if o.name in ("entropy", "ood_score"))
    first.name, second.name = second.name, first.name


def other_input(proto):
    proto.graph.input[0].name = "x"
    for node in proto.graph.node:
        node.input[:] = ["x" if name == "images" else name for name in node.input]


def one_mask(proto):
    """What merging equal expressions makes of T copies: all members have the first one's masks."""
    for name in ("unsqueeze_1", "unsqueeze_2"):
        stored = tensor(proto.graph, name)
        masks = numpy_helper.to_array(stored).copy()
        masks[:] = masks[:1]
        stored.CopyFrom(numpy_helper.from_array(masks, name))


def said_to_be_random(proto):
    record(proto, "sampling", "random")


def overflow(proto):
    """A value that only bright images bring to infinity, times 0."""
    graph = proto.graph
    (
        store(graph, "axes", np.array([1, 2, 3])),
        store(graph, "forty", np.float32(40)),
        store(graph, "none", np.float32(0)),
    )
    place = next(i for i, node in enumerate(graph.node) if "entropy" in node.output)
    dark = helper.make_node("ReduceMin", ["images", "axes"], ["darkest"], "dark", keepdims=0)
    graph.node.insert(place, dark)
    for kind, got, gives in (
        ("Mul", ["darkest", "forty"], "up"),
        ("Exp", ["up"], "huge"),
        ("Mul", ["huge", "none"], "n"),
    ):
        place += 1
        graph.node.insert(place, helper.make_node(kind, got, [gives], f"{gives}_1"))
    insert(graph, "entropy", operator("Add", "n"))


def half_at_the_end(proto):
    short = operator("Cast", to=TensorProto.FLOAT16), operator("Cast", to=TensorProto.FLOAT)
    insert(proto.graph, "variance", *short)


def half_behind_logits(proto):
    insert(proto.graph, LOGITS, operator("Identity"))
    node = next(node for node in proto.graph.node if LOGITS in node.input)
    node.input[:] = ["short" if name == LOGITS else name for name in node.input]
    place = list(proto.graph.node).index(node)
    proto.graph.node.insert(place, helper.make_node("Cast", [LOGITS], ["rounded"], "cast_1", to=TensorProto.FLOAT16))
    proto.graph.node.insert(place + 1, helper.make_node("Cast", ["rounded"], ["short"], "cast_2", to=TensorProto.FLOAT))


def claims(**values):
    def claim(proto):
        for key, value in values.items():
            record(proto, key, value)

    return claim


def weights_lost(proto):
    """A range or a weight that was changed: the file runs, and says something else."""
    kinds = (("weight_scale", TensorProto.FLOAT), ("weight", TensorProto.FLOAT16))
    stored = next(
        t for t in proto.graph.initializer for end, kind in kinds if t.name.endswith(end) and t.data_type == kind
    )
    stored.CopyFrom(numpy_helper.from_array(-3 * numpy_helper.to_array(stored), stored.name))


# Models whose forward pass is wrong.


class Wrong(UncertainModel):
    """An uncertain model with another forward pass."""

    def __init__(self, good: UncertainModel, forward) -> None:
        super().__init__(good.members, good.method, good.origin)
        self.wrong = forward

    def forward(self, images, seed=None):
        return self.wrong(self, images)


def mean_of_batch(model, x):
    return summarise(model.members(x - x.mean(0, keepdim=True)))


def place_in_batch(model, x):
    return summarise(model.members(x + torch.cumsum(torch.ones_like(x), 0)))


def functional_dropout(model, x):
    """A loop over training-mode dropout, as most people write it: the exporter merges its copies."""
    return summarise(
        torch.stack(
            [nn.functional.dropout(model.members(x)[0], 0.5, training=True) for _ in range(model.members.count)]
        )
    )


def sharper(model, x):
    return summarise(model.members(x) * 1.1)


def half_entropy(model, x):
    """The clamp that keeps the logarithm finite is 0 in half."""
    answers = summarise(model.members(x) * 30)
    p = answers.probabilities.half()
    return answers._replace(entropy=-(p * p.clamp_min(1e-12).log()).sum(1).float())


def unsafe_entropy(model, x):
    answers = summarise(model.members(x) * 300)
    return answers._replace(entropy=-(answers.probabilities * answers.probabilities.log()).sum(1))


@dataclass(frozen=True)
class Trap:
    """A file with a fault: made by an edit of a good one, or exported from a model with a wrong forward pass."""

    fault: Callable
    caught: tuple[str, ...]
    """The gates that catch it, one behind the other."""
    said: str
    """By the first."""
    of: str = "fixed"
    torch: str = "none"
    """What the file is compared with: `none`, the `good` model, or the `same` wrong one."""
    runs: bool = True
    """Whether onnxruntime runs it at all, once no gate stops it."""


EDITS = [
    Trap(training_dropout, ("operators", "optimisation"), "Dropout cannot run on every GPU runtime, or is random"),
    Trap(bernoulli, ("operators", "parity"), "Bernoulli", of="random", torch="good"),
    Trap(inverted, ("parity",), "on average, expected", of="random", torch="good"),
    Trap(newer_opset, ("operators",), "opsets are .*22"),
    Trap(newer_opset, ("operators", "loads"), "opsets are .*22", of="random", runs=False),
    Trap(no_cuda_kernel, ("operators",), "Atan, Tan"),
    Trap(custom_operator, ("operators",), "com.microsoft"),
    Trap(control_flow, ("operators",), "If"),
    Trap(function, ("operators",), "1 functions"),
    Trap(external_weight, ("one file", "loads"), "unsqueeze_1 lies in another file", runs=False),
    Trap(external_constant, ("one file",), "one lies in another file"),
    Trap(stack_trace, ("one file",), "/mnt/lab/train.py"),
    Trap(own_folder, ("one file",), "holds the path"),
    Trap(frozen_name, ("signature", "loads", "finite", "batch"), "the batch axes are"),
    Trap(frozen_inside, ("loads", "finite", "batch"), "cannot run 1 images"),
    Trap(outputs_turned, ("signature",), "outputs are"),
    Trap(other_input, ("signature",), "inputs are", runs=False),
    Trap(one_mask, ("members",), "all alike"),
    Trap(one_mask, ("parity", "members"), "differs by", torch="good"),
    Trap(said_to_be_random, ("members",), "two calls gave the same answer"),
    Trap(overflow, ("finite",), "entropy holds NaN"),
    Trap(half_at_the_end, ("precision",), "is not float32, and the file says fp32"),
    Trap(half_behind_logits, ("precision",), "rounded, behind the logits", of="fp16"),
    Trap(half_behind_logits, ("precision",), "rounded, behind the logits", of="int8"),
    Trap(claims(precision="int8", quantization={"symmetric": False}), ("precision",), "says int8", of="fp16"),
    Trap(claims(precision="fp16"), ("precision",), "says fp16", of="int8"),
    Trap(claims(quantization={"symmetric": True}), ("precision",), "zero point", of="int8"),
    Trap(claims(quantization=None), ("operators",), "QuantizeLinear", of="int8"),
    Trap(weights_lost, ("parity",), "", of="int8", torch="good"),
    Trap(weights_lost, ("parity", "members"), "", of="fp16", torch="good"),
]  # fmt: skip
MODELS = [
    Trap(mean_of_batch, ("batch",), "differs by", torch="same"),
    Trap(place_in_batch, ("batch",), "differ", torch="same"),
    Trap(functional_dropout, ("operators", "optimisation", "members"), "Dropout"),
    Trap(sharper, ("parity",), "differs by", torch="good"),
    Trap(half_entropy, ("precision", "finite", "optimisation", "batch"), "is not float32"),
    Trap(unsafe_entropy, ("finite", "optimisation", "batch", "members"), "entropy holds NaN"),
]


def named(trap):
    return f"{trap.fault.__name__}-{trap.of}-{trap.torch}"


def caught_by_these_gates(monkeypatch, trap, content, model, fed=None):
    """Refused by the first; by the next when that one is taken out; let through when all are."""
    said, left = trap.said, dict(GATES)
    monkeypatch.setattr(gates, "GATES", left)
    for gate in trap.caught:
        with pytest.raises(GateError, match=rf"^gate '{gate}': .*{said}") as error:
            check_graph(content, model, fed)
        assert "\n" not in str(error.value)
        del left[gate]
        said = ""
    if trap.runs:
        assert list(check_graph(content, model, fed)) == list(left)


@pytest.mark.parametrize("trap", EDITS, ids=named)
def test_an_edited_file(trap, uncertain, files, images, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    fed = None if trap.of not in ("fp16", "int8") else images.calibration.tensors[0].numpy()
    model = None if trap.torch == "none" else uncertain.but(members=uncertain.members.with_sampling(
        trap.of if trap.of == "random" else "fixed"))  # fmt: skip
    assert list(check_graph(files[trap.of], model, fed)) == list(GATES)
    proto = onnx.load_from_string(files[trap.of])
    trap.fault(proto)
    caught_by_these_gates(monkeypatch, trap, proto.SerializeToString(), model, fed)


@pytest.mark.parametrize("trap", MODELS, ids=named)
def test_an_exported_mistake(trap, uncertain, monkeypatch):
    wrong = Wrong(uncertain, trap.fault)
    content = to_graph(wrong, describe(uncertain, None)).SerializeToString()
    model = {"none": None, "good": uncertain, "same": wrong}[trap.torch]
    caught_by_these_gates(monkeypatch, trap, content, model)


def test_every_gate_is_trapped():
    assert {gate for trap in (*EDITS, *MODELS) for gate in trap.caught} == set(GATES)


def test_quantised_post_processing(uncertain, files, images, monkeypatch, tmp_path):
    """What onnxruntime does to a whole file unless told otherwise."""
    tools = quantisation_tools()
    rest = iter([{"images": images.calibration.tensors[0].numpy()}])

    class Reader(tools.CalibrationDataReader):
        def get_next(self):
            return next(rest, None)

    whole = assemble(body_graph(uncertain.members, uncertain, FloatImages()), uncertain, FloatImages())
    tools.quantize_static(whole, tmp_path / "q.onnx", Reader(), per_channel=True)
    bad = onnx.load(tmp_path / "q.onnx")
    del bad.opset_import[1:]
    bad.metadata_props.extend(onnx.load_from_string(files["int8"]).metadata_props)
    with pytest.raises(GateError, match="^gate 'precision'.*behind the logits"):
        check_graph(bad.SerializeToString(), None)


def test_members_that_differ_little_in_many_classes_are_no_trap(uncertain):
    """Of 1,000 classes at 1/1,000 each, members that differ by a thousandth of that are right to."""

    def diluted(model, x):
        logits = nn.functional.pad(model.members(x) * 1e-5, (0, 996))
        return summarise(logits)

    wrong = Wrong(uncertain, diluted)
    content = to_graph(wrong, describe(uncertain, None)).SerializeToString()
    assert wrong(torch.randn(5, *SHAPE)).variance.max() < 1e-13
    assert check_graph(content, wrong)["members"].startswith("variance")


def test_random_samples_pass_however_they_fall(uncertain, files):
    """The average over draws is compared, with a margin that chance does not reach."""
    model = uncertain.but(members=uncertain.members.with_sampling("random"))
    for _ in range(10):
        assert check_graph(files["random"], model)["parity"].startswith("averages over 16 draws")
    state = torch.get_rng_state()
    check_graph(files["random"], model)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: b"\x08\x0a" + content[:40], "ONNX"),
        (lambda content: content.replace(b"compress_uq.samples", b"compress_uq.sampIes"), "metadata lack samples"),
        (lambda content: content.replace(b'"fixed"', b'"fixed '), "metadata of the ONNX file are damaged"),
    ],
)
def test_what_is_no_file_of_ours(files, spoil, message):
    with pytest.raises(ArtifactError, match=message):
        check_graph(spoil(files["fixed"]), None)
