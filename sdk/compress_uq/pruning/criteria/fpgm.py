"""Filters near the geometric median of their layer, which the others can stand in for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compress_uq.pruning.criteria.criterion import Evidence, PerLayer
from compress_uq.pruning.graph.groups import CoupledLayer, filters

__all__ = ["FPGM"]


@dataclass(frozen=True)
class FPGM(PerLayer):
    """The sum of a filter's Euclidean distances to all filters of its layer (He et al. 2019)."""

    name: ClassVar[str] = "fpgm"

    def layer_scores(self, layer: CoupledLayer, evidence: Evidence) -> Tensor | None:
        """(out_channels,) float64."""
        weight = filters(layer.module)
        if weight is None:
            return None
        # Distances do not change when all filters move, and lose fewer digits near the origin.
        centred = weight - weight.mean(0)
        return torch.cdist(centred, centred).fill_diagonal_(0).sum(1)
