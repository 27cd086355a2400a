"""What the loss would change by, to first order, were a filter zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from compress_uq.pruning.criteria.criterion import Evidence
from compress_uq.pruning.criteria.measured import Gradients, Measured, filter_sums

__all__ = ["Taylor"]


@dataclass(frozen=True)
class Taylor(Measured):
    """(sum over the filter's weights of gradient times weight)^2, mean over batches (Molchanov et al. 2019, eq. 8).

    Batch norm counts with its running statistics: with those of the batch, the loss would not depend on a filter's
    scale, and every sum would be zero.
    """

    name: ClassVar[str] = "taylor"

    def measure(self, layers: Mapping[str, nn.Module], evidence: Evidence) -> Mapping[str, Tensor]:
        """(out_channels,) float64 of each layer."""
        gradients = Gradients(self.name, layers, evidence)
        totals = {name: torch.zeros((), dtype=torch.float64) for name in layers}
        seen = 0
        for images, labels in self.batches(evidence):
            slopes = gradients.of(gradients.loss(images, labels))
            for (name, layer), weight, slope in zip(layers.items(), gradients.weights, slopes, strict=True):
                change = filter_sums(layer, weight.detach() * slope)
                totals[name] = totals[name].to(change.device) + len(labels) * change.square()
            seen += len(labels)
        return {name: total.cpu() / seen for name, total in totals.items()}
