"""No criterion at all: what every other one has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compress_uq.pruning.criteria.criterion import Criterion, Evidence
from compress_uq.pruning.graph.groups import Group

__all__ = ["Random"]


@dataclass(frozen=True)
class Random(Criterion):
    """Scores drawn uniformly from 0..1, the same for the same seed and groups (Mittal et al. 2018)."""

    name: ClassVar[str] = "random"

    def scores(self, groups: Sequence[Group], evidence: Evidence) -> list[Tensor]:
        """(channels,) float64 for each group; the global random state is not used."""
        generator = torch.Generator().manual_seed(evidence.seed)
        return [torch.rand(group.channels, generator=generator, dtype=torch.float64) for group in groups]
