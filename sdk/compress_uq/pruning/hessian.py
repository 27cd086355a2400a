"""Optimal Brain Damage: what the loss would change by, to second order, were a filter's weights zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from compress_uq.errors import PruningError
from compress_uq.pruning.criterion import Evidence
from compress_uq.pruning.measured import Gradients, Measured, filter_sums

__all__ = ["Hessian"]


@dataclass(frozen=True)
class Hessian(Measured):
    """The sum over a filter's weights of h_kk w_k^2 / 2 (LeCun et al. 1990), h the Hessian of the loss.

    The diagonal of diag(w) H diag(w) is estimated with exact Hessian-vector products of random signs (Hutchinson
    1990): the mean of (w v) * H (w v), which has no error at zero weights. Away from a minimum a score can be
    negative: to second order, the loss would fall.
    """

    probes: int = 4
    """Random sign vectors per batch."""
    name: ClassVar[str] = "hessian"

    def measure(self, layers: Mapping[str, nn.Module], evidence: Evidence) -> Mapping[str, Tensor]:
        """(out_channels,) float64 of each layer; the same for the same seed."""
        if self.probes < 1:
            raise PruningError(f"criterion {self.name!r} with probes={self.probes}: expected 1 or more")
        gradients = Gradients(self.name, layers, evidence)
        generator = torch.Generator().manual_seed(evidence.seed)
        totals = {name: torch.zeros((), dtype=torch.float64) for name in layers}
        seen = 0
        for images, labels in self.batches(evidence):
            with gradients.loss(images, labels) as loss:
                slopes = gradients.of(loss, create_graph=True)
                for _ in range(self.probes):
                    probe = [weight.detach() * _signs(weight, generator) for weight in gradients.weights]
                    along = torch.stack([(slope * part).sum() for slope, part in zip(slopes, probe, strict=True)]).sum()
                    products = gradients.of(along, retain_graph=True)
                    for (name, layer), part, product in zip(layers.items(), probe, products, strict=True):
                        curvature = filter_sums(layer, part * product)
                        totals[name] = totals[name].to(curvature.device) + len(labels) * curvature
            seen += len(labels)
        return {name: total.cpu() / (2 * self.probes * seen) for name, total in totals.items()}


def _signs(weight: Tensor, generator: torch.Generator) -> Tensor:
    """+1 or -1 for every weight, drawn on the CPU so that devices agree."""
    drawn = torch.randint(0, 2, weight.shape, generator=generator, dtype=torch.int8)
    return (2 * drawn - 1).to(weight)
