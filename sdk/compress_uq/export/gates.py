"""What an exported graph has to pass before it is kept. Each gate is a function; each has caught a real trap."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch

from compress_uq.decisions import Rule
from compress_uq.errors import ArtifactError, GateError, InputError
from compress_uq.export.agreement import DECIDED_ON, LIKENESS, agree, alike
from compress_uq.export.feeds import extreme_feed, random_feed, torch_answers
from compress_uq.export.formats import INTEGER_NODES, check_formats
from compress_uq.export.graph import OPSET
from compress_uq.runtime import METADATA_PREFIX, session
from compress_uq.types import DECISION_NAMES, OUTPUT_NAMES
from compress_uq.uncertain import UncertainModel

__all__ = ["GATES", "GateInput", "check_graph"]

_ROUNDING = 1e-13
"""Variance that float32 leaves among equal members: the square of a rounding error of a probability."""

# Operators of the default domain that, at opset 18, have a kernel in ONNX Runtime's CUDA provider and stand on
# TensorRT's list. Control flow, Dropout and the random operators are left out on purpose.
_PORTABLE = frozenset(
    (
        "Abs Add And ArgMax AveragePool BatchNormalization Cast Ceil Clip Concat Constant ConstantOfShape Conv "
        "ConvTranspose CumSum DepthToSpace Div Einsum Elu Equal Erf Exp Expand Flatten Floor Gather GatherElements "
        "GatherND Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual HardSigmoid HardSwish Identity "
        "InstanceNormalization LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax MatMul Max MaxPool Min "
        "Mod Mul Neg Not Or PRelu Pad Pow Range Reciprocal ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd "
        "ReduceSum Relu Reshape Resize Round ScatterElements ScatterND Selu Shape Sigmoid Sign Sin Cos Slice "
        "Softmax Softplus SpaceToDepth Split Sqrt Squeeze Sub Sum Tanh Tile TopK Transpose Trilu Unsqueeze Where"
    ).split()
)
_RANDOM = frozenset({"RandomUniformLike"})


@dataclass(frozen=True)
class GateInput:
    """A graph, what runs it, and what torch says where the model is at hand."""

    proto: onnx.ModelProto
    content: bytes
    feed: Mapping[str, np.ndarray]
    optimised: Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]
    plain: Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]
    members: int
    deterministic: bool
    """False where each call draws anew."""
    expected: list[np.ndarray] | None
    """Torch's answers to `feed`; None without a torch model."""
    rules: Mapping[str, Rule]
    """The rules behind the decisions, as the file records them."""
    recorded: Mapping[str, Any]
    """The file's metadata."""


def check_graph(content: bytes, model: UncertainModel | None, images: np.ndarray | None = None) -> dict[str, str]:
    """Run every gate on the bytes of a file; what each one found.

    Args:
        content: the file.
        model: what it was made from, in float32, for the comparison with torch.
        images: what to feed, in the file's layout, four or more; by default five random ones.

    Raises:
        GateError: the first that fails, by name.
        ArtifactError: not an ONNX file, or not one of ours.
    """
    try:
        proto = onnx.load_from_string(content)
    except Exception as error:  # protobuf's errors have no common type
        raise ArtifactError(f"not an ONNX file: {str(error).splitlines()[0]}") from error
    recorded = {
        p.key.removeprefix(METADATA_PREFIX): json.loads(p.value)
        for p in proto.metadata_props
        if p.key.startswith(METADATA_PREFIX)
    }
    if "sampling" not in recorded or "samples" not in recorded:
        raise ArtifactError("the ONNX file was not exported by compress-uq: it does not say how it samples")
    feed = random_feed(proto, images)
    given = GateInput(
        proto,
        content,
        feed,
        _runner(content, True),
        _runner(content, False),
        recorded["samples"],
        recorded["sampling"] != "random",
        None if model is None else torch_answers(model, feed, recorded["input"]),
        _recorded_rules(recorded.get("thresholds", {}), proto),
        recorded,
    )
    return {name: gate(given) for name, gate in GATES.items()}


def _recorded_rules(thresholds: Mapping[str, Any], proto: onnx.ModelProto) -> dict[str, Rule]:
    """The rules behind a file's decisions, from its metadata."""
    decided = [output.name for output in proto.graph.output if output.name in DECISION_NAMES]
    try:
        return {
            name: DECIDED_ON[name][1][found["rule"]](found["options"], threshold=torch.tensor(found["threshold"]))
            for name, found in ((name, thresholds[name]) for name in decided)
        }
    except (KeyError, TypeError, InputError) as error:
        raise ArtifactError(f"the ONNX file does not say how it decides: {error}") from error


def _runner(content: bytes, optimise: bool) -> Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]:
    try:
        made = session(content, optimise=optimise)
    except Exception as error:  # onnxruntime's errors have no common type
        raise GateError(f"gate 'loads': onnxruntime refuses the graph: {str(error).splitlines()[0]}") from error
    return lambda feed: made.run(None, dict(feed))


def _operators(given: GateInput) -> str:
    """Opset 18, one domain, no control flow, no operator that a GPU runtime lacks, nothing random unless asked."""
    opsets = [(item.domain, item.version) for item in given.proto.opset_import]
    if opsets != [("", OPSET)]:
        raise GateError(f"gate 'operators': opsets are {opsets}, expected only the default domain at {OPSET}")
    if given.proto.functions:
        raise GateError(f"gate 'operators': the graph holds {len(given.proto.functions)} functions, expected none")
    allowed = _PORTABLE if given.deterministic else _PORTABLE | _RANDOM
    if given.recorded.get("quantization"):
        allowed |= INTEGER_NODES
    foreign = sorted({node.op_type for node in given.proto.graph.node} - allowed)
    if foreign:
        raise GateError(f"gate 'operators': {', '.join(foreign)} cannot run on every GPU runtime, or is random")
    return f"{len(given.proto.graph.node)} nodes"


def _signature(given: GateInput) -> str:
    """Names and order of inputs and outputs, one symbolic batch axis in front of all of them."""
    graph = given.proto.graph
    names = [o.name for o in graph.output]
    if names != [*OUTPUT_NAMES, *(name for name in DECISION_NAMES if name in names)]:
        raise GateError(f"gate 'signature': outputs are {names}")
    axes = {v.type.tensor_type.shape.dim[0].dim_param for v in (*graph.input, *graph.output)}
    if len(axes) != 1 or "" in axes:
        raise GateError(f"gate 'signature': the batch axes are {sorted(axes)}, expected one symbolic axis in front")
    return f"batch axis {axes.pop()}"


def _one_file(given: GateInput) -> str:
    """No tensor outside the file, and no trace of the machine that made it."""
    for tensor in given.proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise GateError(f"gate 'one file': {tensor.name} lies in another file")
    for place in {os.getcwd(), os.path.expanduser("~") + os.sep, "site-packages"} - {os.sep, os.sep * 2}:
        if len(place) > 5 and place.encode() in given.content:
            raise GateError(f"gate 'one file': the file holds the path {place!r}")
    return f"{len(given.content)} bytes"


def _optimisation(given: GateInput) -> str:
    """The optimiser changes no answer."""
    if not given.deterministic:
        return "not compared: each call draws anew"
    return _compared("optimisation", given, given.optimised(given.feed), given.plain(given.feed))


def _parity(given: GateInput) -> str:
    """onnxruntime answers as torch does in float32 with the same masks."""
    if not given.deterministic or given.expected is None:
        return "not compared: " + ("each call draws anew" if not given.deterministic else "no torch model at hand")
    return _compared("parity", given, given.optimised(given.feed), given.expected)


def _batch(given: GateInput) -> str:
    """An image's answer depends neither on its place in the batch nor on its company."""
    if not given.deterministic:
        return "not compared: each call draws anew"
    whole = given.optimised(given.feed)
    turned = given.optimised({name: value[::-1].copy() for name, value in given.feed.items()})
    agree("batch", _named(given, [field[::-1] for field in turned]), _named(given, whole), given.rules)
    alone = given.optimised({name: value[3:4] for name, value in given.feed.items()})
    return agree("batch", _named(given, alone), _named(given, [field[3:4] for field in whole]), given.rules)


def _members(given: GateInput) -> str:
    """Members that differ in torch differ as much in the file: nothing was merged or optimised away."""
    if given.members == 1:
        return "one member"
    place = OUTPUT_NAMES.index("variance")
    answers = given.optimised(given.feed)
    got = float(answers[place].max())
    if got <= _ROUNDING:
        raise GateError(f"gate 'members': the {given.members} members are all alike: nothing is sampled")
    wanted = got if given.expected is None else float(given.expected[place].max())
    factor = 3 if given.deterministic else 30  # fresh samples of five images differ by themselves
    if not wanted / factor <= got <= factor * max(wanted, 1e-30):
        raise GateError(f"gate 'members': the variance over members is {got:.3g} in the file and {wanted:.3g} in torch")
    if not given.deterministic and np.array_equal(answers[0], given.optimised(given.feed)[0]):
        raise GateError("gate 'members': two calls gave the same answer, and fresh samples were asked for")
    return f"variance {got:.3g}"


def _finite(given: GateInput) -> str:
    """No answer is NaN or infinite, for the darkest and brightest images as well."""
    for feed in (given.feed, extreme_feed(given.proto)):
        for run in (given.optimised, given.plain):
            for output, values in zip(given.proto.graph.output, run(feed), strict=True):
                if not np.isfinite(values).all():
                    raise GateError(f"gate 'finite': {output.name} holds NaN or infinite values")
    return "every output"


def _precision(given: GateInput) -> str:
    """The members are computed in the numbers that the file names, and what follows their logits in float32."""
    return check_formats(given.proto, given.recorded)


def _named(given: GateInput, answers: list[np.ndarray]) -> dict[str, np.ndarray]:
    return {output.name: answer for output, answer in zip(given.proto.graph.output, answers, strict=True)}


def _compared(gate: str, given: GateInput, got: list[np.ndarray], wanted: list[np.ndarray]) -> str:
    """As near as the file's precision lets two ways of computing it come."""
    likeness = LIKENESS.get(given.recorded.get("precision", "fp32"))
    first, second = _named(given, got), _named(given, wanted)
    return agree(gate, first, second, given.rules) if likeness is None else alike(gate, first, second, likeness)


GATES: dict[str, Callable[[GateInput], str]] = {
    "operators": _operators,
    "signature": _signature,
    "one file": _one_file,
    "precision": _precision,
    "finite": _finite,
    "optimisation": _optimisation,
    "parity": _parity,
    "batch": _batch,
    "members": _members,
}
