"""What a graph costs, read off its nodes: products, bytes that it stores, bytes that live at once while it runs."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import onnx
from onnx import NodeProto, TensorProto, helper, shape_inference

__all__ = ["GraphCost", "graph_cost"]


@dataclass(frozen=True)
class GraphCost:
    """Counts of one run of a graph, for a batch."""

    macs: int
    """Multiply-accumulates of convolutions and matrix products."""
    weight_bytes: int
    """Of everything that is stored in the file."""
    activation_bytes: int
    """Of the tensors that are needed at the same time, at most, in the order of the file; a runtime may reuse more."""


def graph_cost(proto: onnx.ModelProto, batch: int) -> GraphCost:
    """The cost of a graph for `batch` images; a tensor whose shape the graph does not tell counts as nothing."""
    shapes = _shapes(proto, batch)
    stored = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    macs = sum(_macs(node, shapes | {name: (dims, 4) for name, dims in stored.items()}) for node in proto.graph.node)
    weights = sum(_bytes(tuple(tensor.dims), tensor.data_type) for tensor in proto.graph.initializer)
    return GraphCost(macs, weights, _live(proto, shapes))


def _shapes(proto: onnx.ModelProto, batch: int) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and bytes of an element of every tensor that is computed, by name, as far as they are known."""
    sized = copy.deepcopy(proto)
    for value in (*sized.graph.input, *sized.graph.output):
        dims = value.type.tensor_type.shape.dim
        if dims and dims[0].dim_param:
            dims[0].dim_value = batch
    graph = shape_inference.infer_shapes(sized, data_prop=True).graph
    found = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        if all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            found[value.name] = (tuple(d.dim_value for d in tensor.shape.dim), _size(tensor.elem_type))
    return found


def _macs(node: NodeProto, shapes: dict[str, tuple[tuple[int, ...], int]]) -> int:
    """Products of one node: each element of the result is a sum over what the operator contracts."""
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul") or node.output[0] not in shapes:
        return 0
    elements = math.prod(shapes[node.output[0]][0])
    if any(name not in shapes for name in node.input[:2]):
        return 0
    given, weight = (shapes[name][0] for name in node.input[:2])
    if node.op_type == "Conv":
        return elements * math.prod(weight[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(given) * math.prod(weight[1:])
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return elements * (given[0] if transposed else given[-1])


def _live(proto: onnx.ModelProto, shapes: dict[str, tuple[tuple[int, ...], int]]) -> int:
    """The most bytes of computed tensors that are held at once."""
    last = {name: number for number, node in enumerate(proto.graph.node) for name in node.input}
    last |= {output.name: len(proto.graph.node) for output in proto.graph.output}
    sizes = {name: math.prod(dims) * size for name, (dims, size) in shapes.items()}
    live = sum(sizes.get(value.name, 0) for value in proto.graph.input)
    most = live
    held = {value.name for value in proto.graph.input}
    for number, node in enumerate(proto.graph.node):
        fresh = [name for name in node.output if name in last]
        held.update(fresh)
        live += sum(sizes.get(name, 0) for name in fresh)
        most = max(most, live)
        for name in set(node.input):
            if name in held and last[name] == number:
                held.remove(name)
                live -= sizes.get(name, 0)
    return most


def _bytes(dims: tuple[int, ...], kind: int) -> int:
    return math.prod(dims) * _size(kind)


def _size(kind: int) -> int:
    """Bytes of one element."""
    return int(helper.tensor_dtype_to_np_dtype(kind).itemsize) if kind != TensorProto.UNDEFINED else 0
