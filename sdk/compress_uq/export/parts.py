"""A network cut where its members part, as two plain graphs whose cost is the least that sampling can cost."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper, shape_inference

from compress_uq.export.body import LOGITS
from compress_uq.export.layouts import FloatImages
from compress_uq.export.member_layouts import MASKS, Unroll, dependent
from compress_uq.uncertain import UncertainModel

__all__ = ["Parts", "split_model", "split_template"]


@dataclass(frozen=True)
class Parts:
    """Two ONNX files; None for a trunk that is empty."""

    trunk: bytes | None
    """Images to what enters the tail."""
    tail: bytes
    """From there to one member's logits, without its masks."""
    members: int


def split_model(model: UncertainModel) -> Parts | None:
    """The parts of a model in float32; None where members share no network, or are not told apart by masks alone."""
    if Unroll.name not in model.members.layouts or len(model.members.layouts) == 1:
        return None
    return split_template(Unroll().trace(model.members, model, FloatImages()), model.members.count)


def split_template(template: onnx.ModelProto, members: int) -> Parts | None:
    """The parts of the graph of one member, as `Unroll.trace` makes it; None where the cut is not across images."""
    plain = _without_masks(template)
    masks = [value.name for value in template.graph.input if value.name.startswith(MASKS)]
    _, bound = dependent(template.graph, masks)
    names = {name for node in bound for name in node.output}
    tail = [node for node in plain.graph.node if not names.isdisjoint(node.output)]
    trunk = [node for node in plain.graph.node if names.isdisjoint(node.output)]
    stored = {tensor.name for tensor in plain.graph.initializer}
    made = {name for node in tail for name in node.output} | stored | {""}
    cut = sorted({name for node in tail for name in node.input} - made)
    typed = {v.name: v for v in shape_inference.infer_shapes(plain, data_prop=True).graph.value_info}
    typed |= {v.name: v for v in plain.graph.input}
    axis = plain.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    if any(name not in typed or not _of_images(typed[name], axis) for name in cut):
        return None
    given = [value for value in plain.graph.input if value.name in cut]
    trunk = _needed(trunk, cut)
    before = None if len(given) == len(cut) else _graph(plain, trunk, plain.graph.input, [typed[name] for name in cut])
    answers = [value for value in plain.graph.output if value.name == LOGITS]
    return Parts(before, _graph(plain, tail, [typed[name] for name in cut], answers), members)


def _without_masks(template: onnx.ModelProto) -> onnx.ModelProto:
    """The same with masks of ones, and without the products of activations with them."""
    made = copy.deepcopy(template)
    graph = made.graph
    masks = [value for value in graph.input if value.name.startswith(MASKS)]
    stored = {tensor.name for tensor in graph.initializer}
    for value in masks:
        dims = [max(1, dim.dim_value) for dim in value.type.tensor_type.shape.dim]
        graph.initializer.append(numpy_helper.from_array(np.ones(dims, np.float32), value.name))
    aliases: dict[str, str] = {value.name: value.name for value in masks}
    kept, same = [], dict[str, str]()
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = same.get(name, name)
        if node.op_type == "Cast" and node.input[0] in aliases:
            aliases[node.output[0]] = node.input[0]
        elif node.op_type == "Mul" and any(name in aliases for name in node.input):
            other = next((name for name in node.input if name not in aliases), None)
            if other is not None and other not in stored:
                same[node.output[0]] = other
                continue
        kept.append(copy.deepcopy(node))
    inputs = [copy.deepcopy(value) for value in graph.input if not value.name.startswith(MASKS)]
    for field, content in ((graph.node, kept), (graph.input, inputs)):
        del field[:]
        field.extend(content)
    return made


def _needed(nodes: list[NodeProto], names: list[str]) -> list[NodeProto]:
    """The nodes that these tensors are computed with."""
    wanted = set(names)
    kept = []
    for node in reversed(nodes):
        if not wanted.isdisjoint(node.output):
            kept.append(node)
            wanted.update(node.input)
    return kept[::-1]


def _graph(
    whole: onnx.ModelProto,
    nodes: list[NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
) -> bytes:
    used = {name for node in nodes for name in node.input}
    stored = [tensor for tensor in whole.graph.initializer if tensor.name in used]
    graph = helper.make_graph(nodes, "main_graph", inputs, outputs, stored)
    made = helper.make_model(graph, opset_imports=list(whole.opset_import), ir_version=whole.ir_version)
    content: bytes = made.SerializeToString()
    return content


def _of_images(value: onnx.ValueInfoProto, axis: str) -> bool:
    """Whether a tensor has the images in front."""
    dims = value.type.tensor_type.shape.dim
    return bool(dims) and dims[0].dim_param == axis
