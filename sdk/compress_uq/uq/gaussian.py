"""Gaussian perturbation: noise on the weights of a trained network, in proportion to each tensor's size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from compress_uq.data import ImageDataset
from compress_uq.errors import InputError
from compress_uq.predict import collect
from compress_uq.training import resolve_device
from compress_uq.uq.base import Trained
from compress_uq.uq.drawn import (
    DiagonalGaussian,
    DrawnWeights,
    WeightDistribution,
    draw_networks,
    flat_weights,
    tracked_weights,
)
from compress_uq.uq.members import Networks

__all__ = ["GaussianPerturbation", "tempered_losses"]

_DEFAULT_SCALE = 0.1
_CANDIDATES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
_IMAGES = 1000
_MEMBERS = 5
_TEMPERATURES = np.geomspace(0.2, 5.0, 33)


@dataclass(frozen=True)
class GaussianPerturbation(DrawnWeights):
    """Members are the network with Gaussian noise on its weights, no training needed (Franchi et al. 2020, baseline).

    The noise of a tensor has `scale` times the root mean square of its weights as standard deviation. `auto` takes the
    largest scale of those tried whose negative log-likelihood on up to 1,000 calibration images is within a standard
    error of the best (Breiman et al. 1984, section 3.4.3), each scale at its own best temperature, since a calibrator
    follows. The likelihood alone would take next to no noise, whose members are all alike. Without calibration images
    `auto` is 0.1. Scale 0 is the network itself, as with one sample.
    """

    scale: float | str = "auto"

    name = "gaussian"
    acts_last: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        valid = self.scale == "auto" if isinstance(self.scale, str) else 0 <= self.scale < math.inf
        if not valid:
            raise InputError(f"scale={self.scale!r}: expected auto, or a number of 0 or more")

    @property
    def looks_at_calibration(self) -> bool:
        """`auto` chooses the scale on them."""
        return self.scale == "auto" and self.samples > 1

    def distribution(self, network: nn.Module, trained: Trained) -> tuple[WeightDistribution, dict[str, object]]:
        """A Gaussian around the network's weights."""
        if not isinstance(self.scale, str):
            return _around(network, self.scale), {"scale": self.scale}
        if trained.calibration is None or self.samples == 1:
            return _around(network, _DEFAULT_SCALE), {"scale": _DEFAULT_SCALE}
        chosen, scores = self._largest_harmless(network, trained, trained.calibration)
        return _around(network, chosen), {"scale": chosen, "nll": scores}

    def _largest_harmless(
        self, network: nn.Module, trained: Trained, images: ImageDataset
    ) -> tuple[float, dict[str, float]]:
        """The last scale before the losses rise by more than their standard error, and the mean loss of each tried."""
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))  # type: ignore[arg-type]
        some = Subset(images, order[:_IMAGES].tolist())
        chosen, best, scores = _CANDIDATES[0], None, {}
        for scale in _CANDIDATES:
            losses = self._losses(network, trained, some, scale)
            scores[str(scale)] = float(losses.mean())
            if best is None or losses.mean() < best.mean():
                best = losses
            excess = losses - best
            if excess.mean() > excess.std(correction=0) / math.sqrt(len(excess)):
                break
            chosen = scale
        return chosen, scores

    def _losses(self, network: nn.Module, trained: Trained, images: ImageDataset, scale: float) -> Tensor:
        networks = draw_networks(
            network,
            _around(network, scale),
            min(self.samples, _MEMBERS),
            seed=self.seed,
            trained=trained,
            norm_batches=self.norm_batches,
        )
        members, device = Networks(networks), resolve_device(trained.device)
        members.to(device)
        (logits,), labels = collect(lambda batch: members(batch).transpose(0, 1), images, device=device)
        return tempered_losses(torch.from_numpy(logits).transpose(0, 1), torch.from_numpy(labels))


def tempered_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood (N,), in nats, of the members' mean probability at the temperature that suits it best.

    Args:
        logits: (T, N, K).
        labels: (N,) int64.
    """
    rows = torch.arange(len(labels))
    tried = ((logits.double() / temperature).softmax(2).mean(0)[rows, labels] for temperature in _TEMPERATURES)
    losses = torch.stack([-chosen.clamp_min(1e-12).log() for chosen in tried])
    return losses[losses.mean(1).argmin()]


def _around(network: nn.Module, scale: float) -> DiagonalGaussian:
    mean = flat_weights(network).cpu()
    sizes = [p.detach().float().square().mean().expand(p.numel()).cpu() for p in tracked_weights(network)]
    return DiagonalGaussian(mean, scale**2 * torch.cat(sizes))
