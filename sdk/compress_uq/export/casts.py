"""Casts and transposes of a float16 graph in an order that onnxruntime's optimiser for CPUs survives."""

from __future__ import annotations

from collections import Counter

import onnx
from onnx import TensorProto

__all__ = ["transpose_before_rounding"]


def transpose_before_rounding(proto: onnx.ModelProto) -> None:
    """Let a transpose work on float32 where its input was rounded to float16 for it alone; the numbers stay the same.

    Layer norm in float32, rounded, transposed, multiplied by a matrix is what a vision transformer's attention does.
    onnxruntime 1.31 takes that transpose into the product (MatmulTransposeFusion), and its NchwcTransformer ends the
    process on what comes out. It leaves alone what is transposed before it is rounded.
    """
    graph = proto.graph
    uses = Counter(name for node in graph.node for name in node.input)
    uses.update(output.name for output in graph.output)
    rounding = {
        node.output[0]: node
        for node in graph.node
        if node.op_type == "Cast" and any(a.name == "to" and a.i == TensorProto.FLOAT16 for a in node.attribute)
    }
    for number, node in enumerate(graph.node):
        cast = rounding.get(node.input[0]) if node.op_type == "Transpose" else None
        if cast is None or uses[cast.output[0]] > 1:
            continue
        turned, rounded = onnx.NodeProto(), onnx.NodeProto()
        turned.CopyFrom(node)
        rounded.CopyFrom(cast)
        between = f"{node.output[0]}_float"
        turned.input[0], turned.output[0] = cast.input[0], between
        rounded.input[0], rounded.output[0] = between, node.output[0]
        cast.CopyFrom(turned)
        graph.node[number].CopyFrom(rounded)
