"""The door to torch-pruning: which channels of which layers have to go together, and their removal."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compress_uq.errors import PruningError
from compress_uq.pruning.graph.axes import axis_size, divisions, surgery
from compress_uq.pruning.graph.blocks import Block, Share, find_blocks
from compress_uq.pruning.graph.passage import obstacle, split_parts
from compress_uq.pruning.graph.refusals import refuse_unprunable
from compress_uq.pruning.graph.surgery import Cut, Surgeon, cut_parameter
from compress_uq.pruning.graph.tracing import Trace, trace

__all__ = ["CoupledLayer", "Group", "dependency_groups", "filters"]

_LOG = logging.getLogger(__name__)
_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)
_WIDTHS = ("hidden_dim", "embed_dim", "hidden_size", "num_features", "d_model", "dim")


@dataclass(frozen=True)
class CoupledLayer:
    """One layer's share in a group."""

    name: str
    module: nn.Module
    side: str
    """`out`: its outputs are the group's channels; `in`: it consumes them."""
    indices: Tensor
    """(M,) positions along the layer's axis."""
    channels: Tensor
    """(M,) the group's channel at each position; a flattened map repeats a channel."""


@dataclass(frozen=True)
class Group:
    """Channels that can only be removed together, from every layer that makes or uses them."""

    name: str
    """The layer that stands for the group."""
    channels: int
    layers: tuple[CoupledLayer, ...]
    divisions: int
    """Channels fall into this many equal parts that must lose the same places: 1 but for grouped convolutions."""
    _remove: Callable[[list[int]], None]

    def remove(self, channels: Sequence[int]) -> None:
        """Take these channels out of every layer, in place; other groups of the same graph stay valid."""
        self._remove(sorted(channels))


def filters(module: nn.Module) -> Tensor | None:
    """Weights (out_channels, the rest) float64 of a convolution or linear layer, on the CPU; None for other layers."""
    if not isinstance(module, _WEIGHTED):
        return None
    weight = module.weight.detach().double().cpu()
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        weight = weight.transpose(0, 1)
    return weight.flatten(1)


def dependency_groups(model: nn.Module, example: Tensor) -> list[Group]:
    """All groups of a model but those that hold its classifier's outputs; the model is in eval mode afterwards.

    Groups that cannot lose channels safely keep them: frozen ones, and those of an operation that the trace does not
    understand; the log names them.

    Raises:
        PruningError: the model cannot be traced, every weight is frozen, or something in it is in the way of pruning:
            a parametrised or masked layer, a parameter of two layers, a buffer with a value for each channel.
    """
    refuse_unprunable(model)
    blocks = find_blocks(model)
    frozen = {id(p) for p in model.parameters() if not p.requires_grad}
    traced = trace(model, example, blocks)
    builder = _Builder(traced, blocks, {module: name for name, module in model.named_modules()}, frozen)
    heads = _classifiers(traced.graph, blocks)
    drafts = [builder.draft(items) for items in traced.groups(heads, _WEIGHTED)]
    drafts += [builder.inner(module, shares) for module, block in blocks.items() for shares in block.inner_groups()]
    _claim(drafts)
    for draft in drafts:
        if draft.obstacle:
            _LOG.info("%s keeps its channels: %s", draft.name, draft.obstacle)
    return [draft.group(builder.surgeon) for draft in drafts if not draft.obstacle]


def _classifiers(graph: Any, blocks: Mapping[nn.Module, Block]) -> list[nn.Module]:
    """The weighted layers from which nothing weighted lies on the way to the output."""
    ends = [node for node in graph.module2node.values() if not node.outputs]
    heads: list[nn.Module] = []
    seen = set()
    while ends:
        node = ends.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node.module, _WEIGHTED) or node.module in blocks:
            heads.append(node.module)
        else:
            ends.extend(node.inputs)
    if not heads:
        raise PruningError("no classifier was found: no convolution or linear layer leads to the output")
    return heads


@dataclass
class _Draft:
    """A group in the making."""

    name: str
    channels: int
    layers: list[CoupledLayer] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    sizes: dict[tuple[int, str], int] = field(default_factory=dict)
    """How long the axis of each cut is."""
    divisions: int = 1
    obstacle: str = ""
    """Why the group has to keep its channels."""
    after: list[Callable[[int, int], None]] = field(default_factory=list)
    """Called with the group's channels before and after a removal."""

    def group(self, surgeon: Surgeon) -> Group:
        """The finished group."""
        left = [self.channels]

        def remove(chosen: Sequence[int]) -> None:
            surgeon.remove(self.cuts, chosen, self.channels)
            before, left[0] = left[0], left[0] - len(chosen)
            for adjust in self.after:
                adjust(before, left[0])

        return Group(self.name, self.channels, tuple(self.layers), self.divisions, remove)


class _Builder:
    """Translates torch-pruning's groups, and the groups inside blocks, to ours."""

    def __init__(
        self, traced: Trace, blocks: Mapping[nn.Module, Block], names: Mapping[nn.Module, str], frozen: set[int]
    ) -> None:
        self.traced, self.blocks, self.names, self.frozen = traced, blocks, names, frozen
        self.modules = {name: module for module, name in names.items()}
        self.surgeon = Surgeon()
        self.passages: dict[Any, tuple[str, int | None]] = {}
        self.ranges: dict[int, tuple[list[int], Tensor]] = {}

    def draft(self, items: Any) -> _Draft:
        """From a group of the dependency graph."""
        draft = _Draft(self.names[items[0].dep.target.module], len(items[0].idxs))
        for item in items:
            module = item.dep.target.module
            outward = self.traced.graph.is_out_channel_pruning_fn(item.dep.handler)
            if module not in self.traced.loose and module not in self.names:
                self._operation(draft, item)
                continue
            indices, channels = self._positions(item.idxs), self._positions(item.root_idxs)
            if module in self.traced.loose:
                self._loose(draft, module, indices, channels)
            elif module in self.blocks:
                block = self.blocks[module]
                width = block.channels[outward]
                for share in block.shares("out" if outward else "in"):
                    self._share(draft, module, share, width, indices, channels)
                for key in block.parameters():
                    axis = (id(module), key)
                    draft.cuts.append(Cut(axis, indices, channels, cut_parameter(module, key, 0)))
                    draft.sizes[axis] = width
                draft.after.append(partial(_tell_block, block))
            else:
                self._layer(draft, self.names[module], module, "out" if outward else "in", indices, channels)
        self._sizes_of_parents(draft)
        return draft

    def _positions(self, numbers: list[int]) -> Tensor:
        """Most lists are 0, 1, 2, ...; making those anew would take longer than the trace."""
        count = len(numbers)
        if count not in self.ranges:
            self.ranges[count] = list(range(count)), torch.arange(count)
        plain, tensor = self.ranges[count]
        return tensor if numbers == plain else torch.as_tensor(numbers)

    def _operation(self, draft: _Draft, item: Any) -> None:
        """What is no layer may change the order of channels, or divide them."""
        node = item.dep.target
        if node not in self.passages:
            self.passages[node] = obstacle(self.traced.graph, node), split_parts(self.traced.graph, node)
        reason, parts = self.passages[node]
        draft.obstacle = draft.obstacle or reason or ("" if parts else "they are split into unequal parts")
        if parts and parts > 1:
            self._divide(draft, parts, draft.channels, self._positions(item.idxs), self._positions(item.root_idxs))

    def inner(self, module: nn.Module, shares: Sequence[Share]) -> _Draft:
        """From a group inside a block."""
        first = module.get_submodule(shares[0].name)
        width = axis_size(first, "out") or 0
        draft = _Draft(f"{self.names[module]}.{shares[0].name}", width)
        for share in shares:
            self._share(draft, module, share, width, torch.arange(width), torch.arange(width))
        return draft

    def _share(
        self, draft: _Draft, block: nn.Module, share: Share, width: int, indices: Tensor, channels: Tensor
    ) -> None:
        name = ".".join(filter(None, (self.names[block], share.name)))
        spread = torch.cat([indices + width * i for i in range(share.repeats)])
        self._layer(
            draft, name, self.modules[name], share.side, spread, channels.repeat(share.repeats), cut=share.is_cut
        )
        self._divide(draft, share.parts, width, indices, channels)

    def _layer(
        self,
        draft: _Draft,
        name: str,
        module: nn.Module,
        side: str,
        indices: Tensor,
        channels: Tensor,
        *,
        cut: bool = True,
    ) -> None:
        size = axis_size(module, side)
        if size is None:
            draft.obstacle = draft.obstacle or f"{name} is a {type(module).__name__}, which cannot lose channels"
            return
        if size == 1 and isinstance(module, nn.PReLU):
            return
        if any(id(p) in self.frozen for p in module.parameters(recurse=False)):
            draft.obstacle = draft.obstacle or f"{name} is frozen"
        if int(indices.max()) >= size:
            draft.obstacle = draft.obstacle or f"{name} uses them in an order that the trace does not understand"
            return
        draft.layers.append(CoupledLayer(name, module, side, indices, channels))
        self._divide(draft, divisions(module), size, indices, channels)
        if cut:
            axis = (id(module), side)
            draft.cuts.append(Cut(axis, indices, channels, surgery(self.traced.graph, module, side)))
            draft.sizes[axis] = size

    def _divide(self, draft: _Draft, parts: int, size: int, indices: Tensor, channels: Tensor) -> None:
        """Equal parts of a whole axis become equal parts of the group."""
        if parts == 1:
            return
        draft.divisions = math.lcm(draft.divisions, parts)
        straight = len(indices) == size == draft.channels and torch.equal(indices.sort().values, torch.arange(size))
        if not straight or not torch.equal(indices, channels) or size % draft.divisions:
            draft.obstacle = draft.obstacle or f"they are a part of what is divided into {parts} equal parts later"

    def _loose(self, draft: _Draft, tensor: nn.Parameter, indices: Tensor, channels: Tensor) -> None:
        found = self.traced.loose[tensor]
        if id(tensor) in self.frozen:
            draft.obstacle = draft.obstacle or f"{found.name} is frozen"
        if tensor in self.traced.contracted and not found.is_buffer:
            draft.obstacle = draft.obstacle or f"{found.name} does more than scale or shift them"
            return
        dims = [d for d, size in enumerate(tensor.shape) if size == len(indices) and size > 1]
        if not dims:
            return
        if found.is_buffer:
            raise PruningError(
                f"buffer {found.name} has a value for each of the {len(indices)} channels of {draft.name}, which no "
                "layer owns: make it a parameter, or attach it after pruning"
            )
        if len(dims) > 1:
            raise PruningError(
                f"parameter {found.name} {tuple(tensor.shape)}: which dimension are the {len(indices)} channels of "
                f"{draft.name}? freeze it to keep them, or give it one dimension of that size"
            )
        axis = (id(tensor), "parameter")
        draft.cuts.append(Cut(axis, indices, channels, cut_parameter(found.owner, found.key, dims[0])))
        draft.sizes[axis] = len(indices)

    def _sizes_of_parents(self, draft: _Draft) -> None:
        """Modules that hold a layer of the group and note its width under a usual name."""
        parents = {self.modules[layer.name.rpartition(".")[0]] for layer in draft.layers}
        for parent in parents - self.blocks.keys():
            for name in _WIDTHS:
                if type(getattr(parent, name, None)) is int and getattr(parent, name) == draft.channels:
                    draft.after.append(partial(_note_width, parent, name))


def _tell_block(block: Block, before: int, after: int) -> None:
    block.after_removal(block.channels[0] + before - after)


def _note_width(parent: nn.Module, name: str, before: int, after: int) -> None:
    setattr(parent, name, after)


def _claim(drafts: Sequence[_Draft]) -> None:
    """A position that two groups claim was followed wrongly: both keep their channels."""
    owners: dict[tuple[int, str], Tensor] = {}
    for number, draft in enumerate(drafts):
        for cut in draft.cuts:
            owner = owners.setdefault(cut.axis, torch.full((draft.sizes[cut.axis],), -1))
            others = owner[cut.indices]
            owner[cut.indices] = number
            if int(others.max()) < 0:
                continue
            for other in {int(o) for o in others.unique()} - {-1, number}:
                for one in (draft, drafts[other]):
                    one.obstacle = one.obstacle or "another group has the same place in a layer"
