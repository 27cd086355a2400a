"""Which numbers a graph computes in, read off its nodes: as its metadata say, and float32 from the logits on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
from onnx import TensorProto, numpy_helper

from compress_uq.errors import GateError
from compress_uq.export.body import FEATURES, LOGITS
from compress_uq.export.integer import OPERATORS

__all__ = ["INTEGER_NODES", "check_formats"]

INTEGER_NODES = frozenset({"QuantizeLinear", "DequantizeLinear"})
_SHORT = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def check_formats(proto: onnx.ModelProto, recorded: Mapping[str, Any]) -> str:
    """What the gate `precision` finds.

    Raises:
        GateError: short numbers where float32 is expected, or none where they are.
    """
    precision = recorded.get("precision", "fp32")
    short = _short(proto)
    if precision == "fp32":
        if short:
            raise GateError(f"{sorted(short)[0]} is not float32, and the file says fp32")
        return "float32 throughout"
    behind = _behind_logits(proto) & short
    if behind:
        raise GateError(
            f"{sorted(behind)[0]}, behind the logits, is not float32: entropies become NaN in "
            "float16 and mutual information loses its order in integers"
        )
    found = _halves(proto) if precision == "fp16" else _quantised(proto, _symmetric(recorded))
    if not found:
        raise GateError(f"the file says {precision}, and no weight is stored so")
    return f"{found}; float32 from the logits on"


def _symmetric(recorded: Mapping[str, Any]) -> bool:
    return bool((recorded.get("quantization") or {}).get("symmetric"))


def _short(proto: onnx.ModelProto) -> set[str]:
    """Tensors in float16, and those that quantisation gives."""
    graph = onnx.shape_inference.infer_shapes(proto).graph
    short = {t.name for t in graph.initializer if t.data_type in _SHORT}
    typed = (*graph.input, *graph.output, *graph.value_info)
    short |= {value.name for value in typed if value.type.tensor_type.elem_type in _SHORT}
    short |= {
        node.output[0]
        for node in graph.node
        if node.op_type == "Cast" and any(a.name == "to" and a.i in _SHORT for a in node.attribute)
    }
    return short | {name for node in graph.node if node.op_type in INTEGER_NODES for name in node.output}


def _behind_logits(proto: onnx.ModelProto) -> set[str]:
    """Everything computed from the logits, and the stored tensors that it is computed with; all outputs are among it.

    Raises:
        GateError: an output that does not come from the logits.
    """
    behind = {LOGITS, FEATURES}
    if not any(LOGITS in node.output for node in proto.graph.node):
        raise GateError(f"the graph has no tensor {LOGITS!r}, where float32 begins")
    stored = {tensor.name for tensor in proto.graph.initializer}
    used: set[str] = set()
    for node in proto.graph.node:
        if not behind.isdisjoint(node.input):
            behind.update(node.output)
            used.update(stored.intersection(node.input))
    stray = [output.name for output in proto.graph.output if output.name not in behind]
    if stray:
        raise GateError(f"{', '.join(stray)} is not computed from the logits")
    return behind | used


def _halves(proto: onnx.ModelProto) -> str:
    count = sum(t.data_type == TensorProto.FLOAT16 and len(t.dims) > 1 for t in proto.graph.initializer)
    return f"{count} weights in float16" if count else ""


def _quantised(proto: onnx.ModelProto, symmetric: bool) -> str:
    """How many operators compute on integers.

    Raises:
        GateError: a zero point that is not 0 where the scheme is symmetric.
    """
    dequantised = {node.output[0] for node in proto.graph.node if node.op_type == "DequantizeLinear"}
    operators = [node for node in proto.graph.node if node.op_type in OPERATORS]
    integer = [node for node in operators if dequantised.issuperset(node.input[:2])]
    if symmetric:
        stored = {tensor.name: tensor for tensor in proto.graph.initializer}
        points = {n.input[2] for n in proto.graph.node if n.op_type in INTEGER_NODES and len(n.input) > 2}
        for name in sorted(points):
            if name in stored and numpy_helper.to_array(stored[name]).any():
                raise GateError(f"the zero point {name} is not 0: TensorRT takes no other")
    return f"{len(integer)} of {len(operators)} operators in 8-bit integers" if integer else ""
