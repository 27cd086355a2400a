"""L2 norms of filters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compress_uq.pruning.criteria.criterion import Evidence, PerLayer
from compress_uq.pruning.graph.groups import CoupledLayer, filters

__all__ = ["L2"]


@dataclass(frozen=True)
class L2(PerLayer):
    """The L2 norm of a channel's filters (Li et al. 2017, section 3.1, with the other norm)."""

    name: ClassVar[str] = "l2"

    def layer_scores(self, layer: CoupledLayer, evidence: Evidence) -> Tensor | None:
        """(out_channels,) float64."""
        weight = filters(layer.module)
        return None if weight is None else weight.square().sum(1).sqrt()
