"""Layer-adaptive magnitudes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compress_uq.pruning.criteria.criterion import Evidence, PerLayer
from compress_uq.pruning.graph.groups import CoupledLayer, filters

__all__ = ["LAMP"]


@dataclass(frozen=True)
class LAMP(PerLayer):
    """A filter's squared L2 norm over the sum of those not smaller in its layer (Lee et al. 2021).

    The paper's score of a weight, taken of whole filters; equal filters have equal scores. Inside one layer the order
    is that of `l2`: what it adds is how layers compare, where channels are chosen over all of them.
    """

    name: ClassVar[str] = "lamp"
    normalised: ClassVar[bool] = False

    def layer_scores(self, layer: CoupledLayer, evidence: Evidence) -> Tensor | None:
        """(out_channels,) float64, in 0..1."""
        weight = filters(layer.module)
        if weight is None:
            return None
        energy = weight.square().sum(1)
        ascending = energy.sort().values
        not_smaller = ascending.flip(0).cumsum(0).flip(0)[torch.searchsorted(ascending, energy)]
        return energy / not_smaller.clamp_min(torch.finfo(torch.float64).tiny)
