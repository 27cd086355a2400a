"""L1 norm of filters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compress_uq.pruning.criteria.criterion import Evidence, PerLayer
from compress_uq.pruning.graph.groups import CoupledLayer, filters

__all__ = ["L1"]


@dataclass(frozen=True)
class L1(PerLayer):
    """The L1 norm of a channel's filters (Li et al. 2017, section 3.1)."""

    name: ClassVar[str] = "l1"

    def layer_scores(self, layer: CoupledLayer, evidence: Evidence) -> Tensor | None:
        """(out_channels,) float64."""
        weight = filters(layer.module)
        return None if weight is None else weight.abs().sum(1)
