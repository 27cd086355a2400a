"""Gaussian perturbation: noise on the weights of a trained network, in proportion to each tensor's size."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

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

__all__ = ["GaussianPerturbation", "tempered_nll"]

_DEFAULT_SCALE = 0.05
_CANDIDATES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2)
_IMAGES = 1000
_TEMPERATURES = np.geomspace(0.2, 5.0, 33)


@dataclass(frozen=True)
class GaussianPerturbation(DrawnWeights):
    """Members are the network with Gaussian noise on its weights, no training needed (Franchi et al. 2020, baseline).

    The noise of a tensor has `scale` times the root mean square of its weights as standard deviation. `auto` takes the
    scale of the lowest negative log-likelihood of the members' mean on up to 1,000 calibration images, each scale at
    its own best temperature, since a calibrator follows; without calibration images it is 0.05. Scale 0 is the
    network itself, as with one sample.
    """

    scale: float | str = "auto"

    name = "gaussian"

    def __post_init__(self) -> None:
        super().__post_init__()
        valid = self.scale == "auto" if isinstance(self.scale, str) else 0 <= self.scale < math.inf
        if not valid:
            raise InputError(f"scale={self.scale!r}: expected auto, or a number of 0 or more")

    def distribution(self, network: nn.Module, trained: Trained) -> tuple[WeightDistribution, dict[str, object]]:
        """A Gaussian around the network's weights."""
        if not isinstance(self.scale, str):
            return _around(network, self.scale), {"scale": self.scale}
        if trained.calibration is None or self.samples == 1:
            return _around(network, _DEFAULT_SCALE), {"scale": _DEFAULT_SCALE}
        scores = {scale: self._score(network, trained, trained.calibration, scale) for scale in _CANDIDATES}
        best = min(scores, key=scores.__getitem__)
        return _around(network, best), {"scale": best, "nll": {str(scale): nll for scale, nll in scores.items()}}

    def _score(self, network: nn.Module, trained: Trained, images: ImageDataset, scale: float) -> float:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))  # type: ignore[arg-type]
        some = Subset(images, order[:_IMAGES].tolist())
        tried = replace(self, scale=scale)
        members = Networks(
            draw_networks(
                network,
                _around(network, scale),
                tried.samples,
                seed=self.seed,
                trained=trained,
                norm_batches=self.norm_batches,
            )
        )
        device = resolve_device(trained.device)
        members.to(device)
        (logits,), labels = collect(lambda batch: members(batch).transpose(0, 1), some, device=device)
        return tempered_nll(torch.from_numpy(logits).transpose(0, 1), torch.from_numpy(labels))


def tempered_nll(logits: Tensor, labels: Tensor) -> float:
    """Negative log-likelihood, in nats, of the mean of members' probabilities at the temperature that suits it best.

    Args:
        logits: (T, N, K).
        labels: (N,) int64.
    """
    best = math.inf
    for temperature in _TEMPERATURES:
        mean = (logits.double() / temperature).softmax(2).mean(0)
        best = min(best, float(-mean[torch.arange(len(labels)), labels].clamp_min(1e-12).log().mean()))
    return best


def _around(network: nn.Module, scale: float) -> DiagonalGaussian:
    mean = flat_weights(network).cpu()
    sizes = [p.detach().float().square().mean().expand(p.numel()).cpu() for p in tracked_weights(network)]
    return DiagonalGaussian(mean, scale**2 * torch.cat(sizes))
