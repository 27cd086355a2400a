"""TRADI: a Gaussian over the weights, tracked by Kalman filters while the network trains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from compress_uq.data import Splits
from compress_uq.errors import InputError, UncertaintyError, UnknownNameError
from compress_uq.stages import Origin
from compress_uq.training import Observer
from compress_uq.uq.base import Trained
from compress_uq.uq.drawn import (
    DiagonalGaussian,
    DrawnWeights,
    WeightDistribution,
    flat_weights,
    require_observed,
    tracked_weights,
)

__all__ = ["TRADI", "WeightTracker", "automatic_noise", "kalman_gain"]

_MEAN_NOISE = 1e-4
_VARIANCE_NOISE = 5e-5
_OBSERVATION_NOISE = 10.0
_SHARE_REMEMBERED = 0.1
_START_LEFT = 0.01
_STARTS = ("weights", "zero")


class WeightTracker(Observer):
    """Kalman filters of each weight's mean and variance (Franchi et al. 2020, equations 3 and 4).

    With state noise Q, observation noise R, gain K = (P + Q) / (P + Q + R), gradient g and learning rate lr, after
    every step of the optimiser:

        mean <- (1 - K) (mean - lr g) + K w
        variance <- (1 - K') (variance + (lr g)^2) + K' (w - mean)^2

    The gains depend on no data, so that one number serves all weights. The second observation is the residual's
    square, as in the authors' code; the paper's own, w^2, has the sign of mean^2 wrong.
    """

    def __init__(self, network: nn.Module, configuration: str, start: str, observation_noise: float) -> None:
        self.configuration = configuration
        self._weights = tracked_weights(network)
        self._noise = observation_noise
        self._mean_doubt, self._variance_doubt, self._forgotten = 0.0, 0.0, 1.0
        weights = flat_weights(network)
        self._mean = weights if start == "weights" else torch.zeros_like(weights)
        self._variance = torch.zeros_like(weights) if start == "weights" else _first_variance(self._weights)

    def after_step(self, done: int, total: int, lr: float) -> None:
        """Predict by the gradient's step, correct by the weights."""
        noise = self._noise or automatic_noise(total)
        mean_gain, self._mean_doubt = kalman_gain(self._mean_doubt, _MEAN_NOISE, noise)
        variance_gain, self._variance_doubt = kalman_gain(self._variance_doubt, _VARIANCE_NOISE, noise)
        self._forgotten *= 1 - mean_gain
        weights = torch.cat([p.detach().flatten().float() for p in self._weights])
        if self._mean.device != weights.device:
            self._mean, self._variance = self._mean.to(weights.device), self._variance.to(weights.device)
        step = torch.cat([_gradient(p) for p in self._weights]).mul_(lr)
        self._mean.sub_(step).lerp_(weights, mean_gain)
        self._variance.addcmul_(step, step).lerp_((weights - self._mean).square_(), variance_gain)

    def state_dict(self) -> dict[str, Tensor]:
        """Mean and variance (P,), the filters' two scalars, and the share of the mean's start that is left in it."""
        scalars = torch.tensor([self._mean_doubt, self._variance_doubt, self._forgotten], dtype=torch.float64)
        return {"mean": self._mean.clone(), "variance": self._variance.clone(), "scalars": scalars}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what was held."""
        self._mean, self._variance = state["mean"].clone(), state["variance"].clone()
        self._mean_doubt, self._variance_doubt, self._forgotten = state["scalars"].tolist()


def kalman_gain(doubt: float, state_noise: float, observation_noise: float) -> tuple[float, float]:
    """Gain and new error variance of a scalar Kalman filter that observes its state."""
    predicted = doubt + state_noise
    gain = predicted / (predicted + observation_noise)
    return gain, (1 - gain) * predicted


def automatic_noise(steps: int) -> float:
    """The source's 10, with which a mean remembers 316 steps; less where that is over a tenth of the training.

    A settled gain is sqrt(Q / R) for Q much below R, and a mean remembers the inverse of its gain.
    """
    return min(_OBSERVATION_NOISE, _MEAN_NOISE * (_SHARE_REMEMBERED * steps) ** 2)


def _start_left(steps: int, observation_noise: float) -> float:
    """Share of the means' start that is left in them after so many steps."""
    doubt, left = 0.0, 1.0
    for _ in range(steps):
        gain, doubt = kalman_gain(doubt, _MEAN_NOISE, observation_noise)
        left *= 1 - gain
    return left


def _gradient(parameter: nn.Parameter) -> Tensor:
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return gradient.flatten().float()


def _first_variance(weights: list[nn.Parameter]) -> Tensor:
    """sqrt(2 / shape[0]) of each tensor, as the authors' code begins."""
    return torch.cat([torch.full((p.numel(),), math.sqrt(2 / len(p)), device=p.device) for p in weights])


@dataclass(frozen=True)
class TRADI(DrawnWeights):
    """Weights drawn from Gaussians that were tracked while training (Franchi et al. 2020).

    `start` is `weights` (mean the weights that the training begins with, variance 0: for fine-tuning) or `zero` (mean
    0, variance sqrt(2 / rows), as the authors train from scratch). `observation_noise` 0 is automatic: the authors' 10,
    and less for trainings under 3,160 steps, which would otherwise end before the start is forgotten.
    """

    start: str = "weights"
    observation_noise: float = 0.0

    name = "tradi"
    trained_apart: ClassVar[bool] = True
    watches: ClassVar[bool] = True
    lr_schedule: ClassVar[str] = "hold"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start not in _STARTS:
            raise UnknownNameError("start", self.start, _STARTS)
        if not 0 <= self.observation_noise < math.inf:
            raise InputError(f"observation_noise={self.observation_noise}: expected above 0, or 0 for automatic")

    def check(self, model: nn.Module, origin: Origin, splits: Splits, steps: int) -> None:
        """Refuse a start at 0 that these steps will not forget: the gains are known before any data."""
        super().check(model, origin, splits, steps)
        if self.start == "zero":
            self._refuse_unforgotten(_start_left(steps, self.observation_noise or automatic_noise(steps)))

    def observer(self, network: nn.Module) -> Observer:
        """The Kalman filters."""
        return WeightTracker(network, repr(self), self.start, self.observation_noise)

    def distribution(self, network: nn.Module, trained: Trained) -> tuple[WeightDistribution, dict[str, object]]:
        """The tracked Gaussians.

        Raises:
            UncertaintyError: a start at 0 that is not forgotten.
        """
        observed = require_observed(self.name, trained, "mean", "variance", "scalars")
        left = float(observed["scalars"][2])
        self._refuse_unforgotten(left)
        return DiagonalGaussian(observed["mean"], observed["variance"]), {"start_left": left}

    def describe(self, model: nn.Module, origin: Origin) -> dict[str, object]:
        """Members and cost."""
        return {**super().describe(model, origin), "training_copies": 2}

    def _refuse_unforgotten(self, left: float) -> None:
        if self.start == "zero" and left > _START_LEFT:
            raise UncertaintyError(
                f"tradi's means still hold {left:.0%} of their start at 0 when the training ends: train for more "
                "epochs, in smaller batches or with start='weights'"
            )
