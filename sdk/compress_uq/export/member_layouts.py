"""How a graph holds the members of one network: folded into the batch, or each as a branch behind the shared trunk."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Sequence
from typing import ClassVar

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, compose, helper, numpy_helper
from torch import Tensor, nn

from compress_uq.errors import GateError
from compress_uq.export.body import FEATURES, LOGITS, NORMALISED, body_graph, of_features
from compress_uq.export.graph import example_inputs, trace
from compress_uq.export.layouts import FloatImages, Layout
from compress_uq.registry import Entry, Registry
from compress_uq.uncertain import UncertainModel
from compress_uq.uq import Members
from compress_uq.uq.features import head_inputs

__all__ = ["MASKS", "MEMBER_LAYOUTS", "Fold", "MemberLayout", "Unroll", "dependent"]

MASKS = "masks_"
"""What the names of a branch's mask inputs begin with."""


class MemberLayout(ABC):
    """From members to the graph of their logits, in two steps, between which a precision may change the numbers."""

    name: ClassVar[str]

    @abstractmethod
    def trace(self, members: Members, model: UncertainModel, layout: Layout) -> onnx.ModelProto:
        """The graph that holds every weight."""

    @abstractmethod
    def feed(self, members: Members, images: Tensor, seed: Tensor | None, number: int) -> dict[str, np.ndarray]:
        """What that graph is fed with the `number`-th batch of images besides them."""

    @abstractmethod
    def finish(self, graph: onnx.ModelProto, model: UncertainModel) -> onnx.ModelProto:
        """From that graph to the one that ends in `LOGITS` and `FEATURES`."""


class Fold(MemberLayout):
    """T members as T * N images; what comes before the first random layer runs once."""

    name = "fold"

    def trace(self, members: Members, model: UncertainModel, layout: Layout) -> onnx.ModelProto:
        """As the members compute it."""
        return body_graph(members, model, layout)

    def feed(self, members: Members, images: Tensor, seed: Tensor | None, number: int) -> dict[str, np.ndarray]:
        """Seeds, where there are."""
        return {} if seed is None else {"seed": seed.numpy()}

    def finish(self, graph: onnx.ModelProto, model: UncertainModel) -> onnx.ModelProto:
        """It is finished."""
        return graph


class Unroll(MemberLayout):
    """A branch of N images for each member; whatever no mask reaches runs once. All branches share their weights."""

    name = "unroll"

    def trace(self, members: Members, model: UncertainModel, layout: Layout) -> onnx.ModelProto:
        """One member, its masks as inputs; members that are networks of their own are branches already."""
        if members.layouts == (self.name,):
            return body_graph(members, model, layout)
        images, *seed = example_inputs(model, 2)
        masks = {f"{MASKS}{site}": drawn[0] for site, drawn in enumerate(members.draw(images, *seed))}
        first = "images" if isinstance(layout, FloatImages) else NORMALISED
        outputs = [LOGITS, FEATURES][: 1 + of_features(model)]
        return trace(_Branch(members, of_features(model)), {first: images}, outputs, several=masks)

    def feed(self, members: Members, images: Tensor, seed: Tensor | None, number: int) -> dict[str, np.ndarray]:
        """The masks of one member after the other."""
        if members.layouts == (self.name,):
            return {}
        drawn = members.draw(images, *(() if seed is None else (seed,)))
        return {f"{MASKS}{site}": masks[number % members.count].numpy() for site, masks in enumerate(drawn)}

    def finish(self, graph: onnx.ModelProto, model: UncertainModel) -> onnx.ModelProto:
        """As many copies of what depends on the masks as there are members.

        Raises:
            GateError: the logits do not depend on the masks.
        """
        if model.members.layouts == (self.name,):
            return graph
        return _unrolled(graph, model)


MEMBER_LAYOUTS: Registry[type[MemberLayout]] = Registry(
    "layout",
    Entry(Fold.name, "samples in the batch axis, T images for each, behind a trunk that runs once", "", Fold),
    Entry(Unroll.name, "a branch of the graph for each sample, behind a trunk that runs once", "", Unroll),
)


class _Branch(nn.Module):
    """One member: logits (1, N, K) and, where a score looks at them, features (1, N, D)."""

    def __init__(self, members: Members, of_features: bool) -> None:
        super().__init__()
        self.members, self.of_features = members, of_features

    def forward(self, images: Tensor, masks: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with head_inputs() as kept:
            logits = self.members.branch(images, masks).unsqueeze(0)
        return (logits, kept[0].unsqueeze(0)) if self.of_features else (logits,)


class _Draws(nn.Module):
    """The masks of all sites and members."""

    def __init__(self, members: Members) -> None:
        super().__init__()
        self.members = members

    def forward(self, images: Tensor, seed: Tensor | None = None) -> tuple[Tensor, ...]:
        return self.members.draw(images, seed)


def dependent(graph: GraphProto, names: Iterable[str]) -> tuple[list[NodeProto], list[NodeProto]]:
    """The nodes that do not depend on any of these tensors, and those that do; both in order."""
    reached = set(names)
    free: list[NodeProto] = []
    bound: list[NodeProto] = []
    for node in graph.node:
        depends = not reached.isdisjoint(node.input)
        (bound if depends else free).append(node)
        if depends:
            reached.update(node.output)
    return free, bound


def _unrolled(template: onnx.ModelProto, model: UncertainModel) -> onnx.ModelProto:
    made = copy.deepcopy(template)
    graph = made.graph
    sites = [value.name for value in graph.input if value.name.startswith(MASKS)]
    trunk, tail = dependent(graph, sites)
    of_member = {name for node in tail for name in node.output}
    if LOGITS not in of_member:
        raise GateError("layout 'unroll': the logits do not depend on any mask")
    count = model.members.count
    draws = (_fixed if model.members.sampling == "fixed" else _drawn)(graph, sites, model)
    branches = [_of_member(node, of_member.union(sites), member) for member in range(count) for node in tail]
    nodes = [*draws, *trunk, *branches, _beside(LOGITS, count)]
    if FEATURES in of_member:
        graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), f"{FEATURES}/axes"))
        nodes.append(_beside(FEATURES, count, f"{FEATURES}/members"))
        given = [f"{FEATURES}/members", f"{FEATURES}/axes"]
        nodes.append(helper.make_node("ReduceMean", given, [FEATURES], f"{FEATURES}/mean", keepdims=1))
    copies = [copy.deepcopy(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    left = [value for value in graph.input if value.name not in sites]
    inputs = [copy.deepcopy(value) for value in left]
    del graph.input[:]
    graph.input.extend(inputs)
    if model.members.sampling == "seeded":
        batch = inputs[0].type.tensor_type.shape.dim[0].dim_param
        graph.input.append(helper.make_tensor_value_info("seed", onnx.TensorProto.INT64, [batch]))
    return made


def _of_member(node: NodeProto, own: Container[str], member: int) -> NodeProto:
    """A member's copy of a node; tensors that are not its own are shared."""
    made = copy.deepcopy(node)
    made.name = f"{node.name}/{member}"
    for names in (made.input, made.output):
        for place, name in enumerate(names):
            if name in own:
                names[place] = f"{name}/{member}"
    return made


def _beside(name: str, count: int, out: str | None = None) -> NodeProto:
    """All members' tensors of one name, along the first axis."""
    return helper.make_node("Concat", [f"{name}/{t}" for t in range(count)], [out or name], out or name, axis=0)


def _fixed(graph: GraphProto, sites: Sequence[str], model: UncertainModel) -> list[NodeProto]:
    """Masks stored as constants, `SITE/MEMBER`."""
    for site, drawn in zip(sites, model.members.draw(example_inputs(model, 1)[0]), strict=True):
        for member, mask in enumerate(drawn):
            graph.initializer.append(numpy_helper.from_array(mask.cpu().numpy(), f"{site}/{member}"))
    return []


def _drawn(graph: GraphProto, sites: Sequence[str], model: UncertainModel) -> list[NodeProto]:
    """Masks of all members, drawn together so that they are stratified, and taken apart."""
    images, *seed = example_inputs(model, 2)
    inputs = dict(zip((graph.input[0].name, "seed"), (images, *seed), strict=False))
    every = [f"{site}/all" for site in sites]
    traced = trace(_Draws(model.members), inputs, every)
    draws = compose.add_prefix(traced, "draw/", rename_inputs=False, rename_outputs=False)
    graph.initializer.extend(draws.graph.initializer)
    nodes = list(draws.graph.node)
    for member in range(model.members.count):
        graph.initializer.append(numpy_helper.from_array(np.array(member, np.int64), f"draw/member/{member}"))
        for site, masks in zip(sites, every, strict=True):
            out = f"{site}/{member}"
            nodes.append(helper.make_node("Gather", [masks, f"draw/member/{member}"], [out], out, axis=0))
    return nodes
