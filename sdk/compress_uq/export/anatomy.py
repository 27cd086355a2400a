"""What a graph is made of, read without running it: operators, inputs and outputs, and what lies in the file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import onnx

from compress_uq.errors import GateError
from compress_uq.export.formats import INTEGER_NODES
from compress_uq.export.graph import OPSET
from compress_uq.runtime import METADATA_PREFIX
from compress_uq.types import DECISION_NAMES, OUTPUT_NAMES

__all__ = ["check_one_file", "check_operators", "check_signature"]

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

_SOURCE = re.compile(r"([A-Za-z]:\\|/|~)[^\n\"']*\.py\b")
"""A source file's place, as stack traces name it."""


def check_operators(proto: onnx.ModelProto, *, random: bool, integer: bool) -> str:
    """Opset 18, one domain, no control flow, no operator that a GPU runtime lacks, nothing random unless asked.

    Raises:
        GateError: one of these.
    """
    opsets = [(item.domain, item.version) for item in proto.opset_import]
    if opsets != [("", OPSET)]:
        raise GateError(f"opsets are {opsets}, expected only the default domain at {OPSET}")
    if proto.functions:
        raise GateError(f"the graph holds {len(proto.functions)} functions, expected none")
    allowed = _PORTABLE | (_RANDOM if random else frozenset()) | (INTEGER_NODES if integer else frozenset())
    foreign = sorted({node.op_type for node in proto.graph.node} - allowed)
    if foreign:
        raise GateError(f"{', '.join(foreign)} cannot run on every GPU runtime, or is random")
    return f"{len(proto.graph.node)} nodes"


def check_signature(proto: onnx.ModelProto) -> str:
    """Names and order of inputs and outputs, one symbolic batch axis in front of all of them.

    Raises:
        GateError: one of these.
    """
    graph = proto.graph
    names = [i.name for i in graph.input]
    if names not in (["images"], ["images", "seed"]):
        raise GateError(f"inputs are {names}, expected images, and seed where the file takes one")
    names = [o.name for o in graph.output]
    if names != [*OUTPUT_NAMES, *(name for name in DECISION_NAMES if name in names)]:
        raise GateError(f"outputs are {names}, expected {', '.join(OUTPUT_NAMES)}")
    shapes = [value.type.tensor_type.shape.dim for value in (*graph.input, *graph.output)]
    axes = {shape[0].dim_param if shape else "" for shape in shapes}
    if len(axes) != 1 or "" in axes:
        raise GateError(f"the batch axes are {sorted(axes)}, expected one symbolic axis in front")
    if not all(axis.dim_value > 0 for axis in shapes[0][1:]):
        raise GateError("the size of an image is not fixed")
    return f"batch axis {axes.pop()}"


def check_one_file(proto: onnx.ModelProto, content: bytes) -> str:
    """No tensor outside the file, and no trace of the machine that made it.

    Raises:
        GateError: one of these.
    """
    attributes = (attribute for node in proto.graph.node for attribute in node.attribute)
    for tensor in (*proto.graph.initializer, *(a.t for a in attributes if a.HasField("t"))):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise GateError(f"{tensor.name} lies in another file")
    for place in {os.getcwd(), os.path.expanduser("~") + os.sep, "site-packages"} - {os.sep, os.sep * 2}:
        if len(place) > 5 and place.encode() in content:
            raise GateError(f"the file holds the path {place!r}")
    for text in _remarks(proto):
        found = _SOURCE.search(text)
        if found:
            raise GateError(f"the file holds the path {found[0]!r}")
    return f"{len(content)} bytes"


def _remarks(proto: onnx.ModelProto) -> Iterator[str]:
    """Every text that says something about a part of the graph, rather than being the graph."""
    graph = proto.graph
    for item in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        yield item.doc_string
        yield from (entry.value for entry in item.metadata_props if not entry.key.startswith(METADATA_PREFIX))
