"""Channels hidden from what uses them, which equals taking them out, with the model as it was afterwards.

Layers that read hidden channels see zeros, and norms over channels take their statistics over the others. These are
hooks on the layers, fit for `torch.func.vmap`. Only attention, and layers whose weights are used without calling them,
have weights set to zero for as long as it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress_uq.errors import PruningError
from compress_uq.pruning.criteria.contributions import is_separable, less
from compress_uq.pruning.graph.groups import CoupledLayer, Group

__all__ = ["Hiding"]


@dataclass(frozen=True, eq=False)
class _Use:
    """A layer of a group, on one side."""

    name: str
    module: nn.Module
    side: str
    indices: Tensor
    """(M,) positions along the layer's axis."""
    channels: Tensor
    """(M,) the group's channel at each position."""
    width: int
    """Channels of the group."""

    def table(self) -> Tensor | None:
        """(channels, M / channels) positions of each channel, where the layer is a sum over its inputs; else None."""
        counts = self.channels.bincount(minlength=self.width)
        if not is_separable(self.module) or bool((counts * self.width != len(self.channels)).any()):
            return None
        return self.indices[self.channels.argsort(stable=True)].view(self.width, -1)

    def kept(self, gone: Tensor, size: int, like: Tensor) -> Tensor:
        """(size,) 0 at the positions of channels that are gone, else 1."""
        flags = like.new_zeros(self.width).scatter(0, gone, 1.0)
        return 1 - like.new_zeros(size).index_add(0, self.indices, flags[self.channels])


class Hiding:
    """One group's channels, which can be hidden from what uses them.

    Args:
        group: its layers are the model's.
        called: the modules that the model's forward() calls.
        device: the model's.

    Raises:
        PruningError: a layer reads channels in a way that does not let them be hidden.
    """

    def __init__(self, group: Group, called: Collection[nn.Module], device: torch.device) -> None:
        uses = _uses(group, device)
        opaque = [use for use in uses if _is_opaque(use, called)]
        for use in opaque:
            if not isinstance(use.module, nn.Linear | nn.MultiheadAttention):
                raise PruningError(
                    f"the channels of {group.name} cannot be hidden from {use.name}, whose weights forward() uses "
                    f"without calling it: take another criterion, or keep {group.name}"
                )
        self.mappable = not opaque
        self._norms = [use for use in uses if type(use.module) in _NORMS or isinstance(use.module, nn.LayerNorm)]
        self._readers = [(use, use.table()) for use in uses if use.side == "in" and use not in opaque]
        # Queries and keys meet before anything reads them: where attention is, all that makes channels is silent too.
        self._silenced = [use for use in uses if opaque and isinstance(use.module, nn.Linear | nn.MultiheadAttention)]
        self.modules = {use.module for use in uses if use.side == "in" or use in self._norms}
        """What the channels are hidden from."""

    @contextmanager
    def hide(self, gone: Tensor, choice: Tensor | None = None) -> Iterator[None]:
        """Hide the channels `gone` (G,) and those of a `choice` (M,), which may be mapped, inside the block."""
        both = gone if choice is None else torch.cat([gone, choice])
        with ExitStack() as stack:
            for use, table in self._readers:
                if len(gone):
                    stack.callback(_masked(use, gone))
                if choice is not None:
                    hook = _masked(use, choice) if table is None else _lessened(use, table[choice].flatten())
                    stack.callback(hook)
            if len(both):
                for use in self._norms:
                    stack.callback(_renormed(use, both))
                for use in self._silenced:
                    stack.enter_context(_silent(use, use.indices[torch.isin(use.channels, both)]))
            yield


def _uses(group: Group, device: torch.device) -> list[_Use]:
    """The layers of a group; one that holds its channels at several places comes once for each side."""
    places: dict[tuple[str, str], list[CoupledLayer]] = {}
    for layer in group.layers:
        places.setdefault((layer.name, layer.side), []).append(layer)
    found = []
    for (name, side), layers in places.items():
        pairs = torch.stack([torch.cat([x.indices for x in layers]), torch.cat([x.channels for x in layers])])
        indices, channels = pairs.unique(dim=1).to(device)
        found.append(_Use(name, layers[0].module, side, indices, channels, group.channels))
    return found


def _is_opaque(use: _Use, called: Collection[nn.Module]) -> bool:
    """Whether hooks cannot hide channels: attention, whole or as one layer of queries, keys and values."""
    if isinstance(use.module, nn.MultiheadAttention):
        return True
    if use.side == "in":
        return use.module not in called
    return isinstance(use.module, nn.Linear) and len(use.indices) > use.width


def _masked(use: _Use, gone: Tensor) -> Callable[[], None]:
    """The layer sees zeros."""
    axis = -1 if isinstance(use.module, nn.Linear) else 1

    def hook(_module: nn.Module, seen: tuple[Any, ...]) -> tuple[Any, ...]:
        keep = use.kept(gone, seen[0].shape[axis], seen[0])
        return seen[0] * (keep if axis == -1 else keep.view(-1, *[1] * (seen[0].ndim - 2))), *seen[1:]

    return use.module.register_forward_pre_hook(hook).remove


def _lessened(use: _Use, positions: Tensor) -> Callable[[], None]:
    """The layer's answer lacks the contribution of some input positions."""

    def hook(module: nn.Module, seen: tuple[Tensor, ...], answer: Tensor) -> Tensor:
        return less(module, seen[0], answer, positions)

    return use.module.register_forward_hook(hook).remove


def _renormed(use: _Use, gone: Tensor) -> Callable[[], None]:
    """The norm's statistics are those of the channels that are left."""
    normalise = _NORMS.get(type(use.module), _layer_norm)

    def hook(module: nn.Module, seen: tuple[Tensor, ...], _answer: Tensor) -> Tensor:
        return normalise(module, seen[0], use, gone)

    return use.module.register_forward_hook(hook).remove


@contextmanager
def _silent(use: _Use, positions: Tensor) -> Iterator[None]:
    """Weights by which a layer reads or makes hidden channels are zero inside the block."""
    layer: Any = use.module
    with ExitStack() as stack:
        if isinstance(layer, nn.MultiheadAttention):
            rows = torch.cat([positions + layer.embed_dim * i for i in range(3)])
            stack.enter_context(_zeros(layer.in_proj_weight, (slice(None), positions)))
            stack.enter_context(_zeros(layer.in_proj_weight, (rows,)))
            stack.enter_context(_zeros(layer.in_proj_bias, (rows,)))
        elif use.side == "in":
            stack.enter_context(_zeros(layer.weight, (slice(None), positions)))
        else:
            stack.enter_context(_zeros(layer.weight, (positions,)))
            stack.enter_context(_zeros(layer.bias, (positions,)))
        yield


@contextmanager
def _zeros(parameter: Tensor | None, place: tuple[Any, ...]) -> Iterator[None]:
    """A part of a parameter is zero inside the block."""
    if parameter is None:
        yield
        return
    kept = parameter.detach()[place].clone()
    try:
        parameter.detach()[place] = 0
        yield
    finally:
        parameter.detach()[place] = kept


def _layer_norm(module: Any, x: Tensor, use: _Use, gone: Tensor) -> Tensor:
    """Over the last dimension, or over the first of an image's where the class is one of those for images."""
    first = type(module).__name__.endswith("2d")
    x = x.movedim(1, -1) if first else x
    x = _scaled(module, _standardised(x, use.kept(gone, x.shape[-1], x), (-1,), module.eps))
    return x.movedim(-1, 1) if first else x


def _group_norm(module: Any, x: Tensor, use: _Use, gone: Tensor) -> Tensor:
    parts = x.unflatten(1, (module.num_groups, -1))
    keep = use.kept(gone, x.shape[1], x).view(module.num_groups, -1, *[1] * (x.ndim - 2))
    parts = _standardised(parts, keep, tuple(range(2, parts.ndim)), module.eps)
    return _scaled(module, parts.flatten(1, 2).movedim(1, -1)).movedim(-1, 1)


_NORMS: dict[type[nn.Module], Callable[[Any, Tensor, _Use, Tensor], Tensor]] = {
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
}


def _standardised(x: Tensor, keep: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    """Mean 0 and variance 1 over the values along some axes that are kept (1, not 0)."""
    count = (torch.ones_like(x) * keep).sum(axes, keepdim=True)
    mean = (x * keep).sum(axes, keepdim=True) / count
    variance = ((x - mean).square() * keep).sum(axes, keepdim=True) / count
    return (x - mean) * torch.rsqrt(variance + eps)


def _scaled(module: Any, x: Tensor) -> Tensor:
    """By the norm's weight and bias, where it has them; channels come last."""
    x = x if module.weight is None else x * module.weight
    return x if module.bias is None else x + module.bias
