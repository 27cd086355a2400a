"""What has gone from each group, in the channels' first numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress_uq.pruning.graph import Group

__all__ = ["PrunedLayer", "Record"]


@dataclass(frozen=True)
class PrunedLayer:
    """One group of channels before and after."""

    name: str
    before: int
    after: int
    removed: tuple[int, ...]
    """The group's channels that are gone, as numbered before."""
    consumers: tuple[tuple[str, tuple[int, ...]], ...]
    """Layers that used them, and their input positions that are gone."""


@dataclass
class Record:
    """What has gone so far, in the channels' first numbers."""

    widths: dict[str, int]
    removed: dict[str, list[int]]
    _alive: dict[str, list[int]]
    _consumers: dict[str, list[tuple[str, Tensor, Tensor]]]

    @classmethod
    def of(cls, groups: Sequence[Group]) -> Record:
        """Nothing has gone yet."""
        consumers = {
            g.name: [(layer.name, layer.indices, layer.channels) for layer in g.layers if layer.side == "in"]
            for g in groups
        }
        widths = {g.name: g.channels for g in groups}
        return cls(widths, {n: [] for n in widths}, {n: list(range(w)) for n, w in widths.items()}, consumers)

    @property
    def anything(self) -> bool:
        """Whether a channel has gone at all."""
        return any(self.removed.values())

    def due(self, groups: Sequence[Group], final: Mapping[str, int], fraction: float) -> list[int]:
        """How many more go from each group to reach a fraction of the whole removal."""
        due = []
        for group in groups:
            whole = final[group.name] if fraction >= 1 else int(final[group.name] * fraction + 1e-9)
            more = max(0, whole - len(self.removed[group.name]))
            due.append(more // group.divisions * group.divisions)
        return due

    def take(self, name: str, channels: Sequence[int]) -> None:
        """Note that these go, as numbered among those that are left."""
        alive = self._alive[name]
        self.removed[name] = sorted([*self.removed[name], *(alive[c] for c in channels)])
        gone = set(channels)
        self._alive[name] = [number for place, number in enumerate(alive) if place not in gone]

    def layers(self) -> tuple[PrunedLayer, ...]:
        """The whole removal, group by group."""
        found = []
        for name, width in self.widths.items():
            gone = torch.zeros(width, dtype=torch.bool)
            gone[self.removed[name]] = True
            consumers = tuple(
                (layer, tuple(sorted(indices[gone[channels]].tolist())))
                for layer, indices, channels in self._consumers[name]
            )
            removed = tuple(self.removed[name])
            found.append(PrunedLayer(name, width, width - len(removed), removed, consumers))
        return tuple(found)
