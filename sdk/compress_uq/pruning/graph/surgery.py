"""Taking channels out of layers, in place, whatever was taken out before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

__all__ = ["Cut", "Surgeon", "cut_parameter"]


@dataclass(frozen=True, eq=False)
class Cut:
    """Where a group's channels lie along one axis of one module."""

    axis: tuple[int, str]
    """The module's id and which of its axes."""
    indices: Tensor
    """(M,) positions along the axis, as numbered before anything was removed."""
    channels: Tensor
    """(M,) the group's channel at each position."""
    prune: Callable[[list[int]], object]
    """Removes positions, as numbered now."""


@dataclass
class Surgeon:
    """Remembers what is gone from every axis, so that positions can be named by their first number."""

    gone: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def remove(self, cuts: Sequence[Cut], channels: Sequence[int], width: int) -> None:
        """Take channels of a group that was `width` wide out of everything that holds them."""
        chosen = torch.zeros(width, dtype=torch.bool)
        chosen[list(channels)] = True
        for cut in cuts:
            positions = cut.indices[chosen[cut.channels]].sort().values
            before = self.gone.get(cut.axis, torch.empty(0, dtype=torch.long))
            positions = positions[~torch.isin(positions, before)]
            if len(positions):
                cut.prune((positions - torch.searchsorted(before, positions)).tolist())
                self.gone[cut.axis] = torch.cat([before, positions]).sort().values


def cut_parameter(owner: nn.Module, name: str, dim: int) -> Callable[[list[int]], None]:
    """What removes positions along one dimension of a module's own parameter or buffer."""

    def prune(positions: list[int]) -> None:
        old: Tensor = getattr(owner, name)
        kept = torch.ones(old.shape[dim], dtype=torch.bool)
        kept[positions] = False
        index = kept.nonzero().flatten().to(old.device)
        cut = old.detach().index_select(dim, index)
        setattr(owner, name, nn.Parameter(cut, old.requires_grad) if isinstance(old, nn.Parameter) else cut)

    return prune
