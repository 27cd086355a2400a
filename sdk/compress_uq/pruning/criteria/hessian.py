"""Optimal Brain Damage: what the loss would change by, to second order, were a filter's weights zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from compress_uq.errors import PruningError
from compress_uq.pruning.criteria.criterion import Evidence
from compress_uq.pruning.criteria.measured import Gradients, Measured, filter_sums

__all__ = ["Hessian"]


@dataclass(frozen=True)
class Hessian(Measured):
    """The sum over a filter's weights of h_kk w_k^2 / 2 (LeCun et al. 1990), h the Hessian of the cross-entropy.

    Its diagonal is that of J^T S S^T J, J the Jacobian of the logits and S S^T = diag(p) - p p^T the Hessian by them:
    exactly so where logits are piecewise linear in each single weight, as with ReLU, and by the Gauss-Newton
    approximation, which the paper takes too, elsewhere. It is estimated without bias as the mean of (J^T S v)^2 over
    random signs v. Hutchinson's estimate from products with the whole Hessian is not used: the noise of what is off its
    diagonal drowns the order of a real network's filters.
    """

    probes: int = 8
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
            logits = gradients.logits(images, labels)
            for _ in range(self.probes):
                with torch.enable_grad():
                    signed = (logits * _curvature_sample(logits.detach(), generator)).sum()
                slopes = gradients.of(signed, retain_graph=True)
                for (name, layer), weight, slope in zip(layers.items(), gradients.weights, slopes, strict=True):
                    change = filter_sums(layer, (weight.detach() * slope).square())
                    totals[name] = totals[name].to(change.device) + change
            seen += len(labels)
        return {name: total.cpu() / (2 * self.probes * seen) for name, total in totals.items()}


def _curvature_sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    """S v (N, K) for signs v, where S = diag(sqrt(p)) - p sqrt(p)^T; drawn on the CPU, so that devices agree."""
    signs = (2 * torch.randint(0, 2, logits.shape, generator=generator) - 1).to(logits)
    probabilities = logits.softmax(1)
    roots = probabilities.sqrt() * signs
    return roots - probabilities * roots.sum(1, keepdim=True)
