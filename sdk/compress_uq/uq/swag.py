"""SWA-Gaussian: a Gaussian fitted to the weights that a training passes through at its end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from compress_uq.data import Splits
from compress_uq.errors import InputError, UncertaintyError
from compress_uq.stages import Origin
from compress_uq.training import Observer
from compress_uq.uq.base import Trained
from compress_uq.uq.drawn import DrawnWeights, WeightDistribution, flat_weights, require_observed

__all__ = ["SWAG", "SnapshotMoments", "SwagGaussian"]


@dataclass(frozen=True)
class SwagGaussian:
    """N(mean, scale (diag(variance) + D^T D / (rows - 1))), D the deviations; Maddox et al. 2019, equation 1."""

    mean: Tensor
    """(P,)."""
    variance: Tensor
    """(P,)."""
    deviations: Tensor
    """(rank, P), or no rows for a diagonal covariance."""
    scale: float

    def draw(self, generator: torch.Generator) -> Tensor:
        """One sample (P,)."""
        noise = self.variance.sqrt() * torch.randn(self.mean.shape, generator=generator)
        rows = len(self.deviations)
        if rows > 1:
            noise += torch.randn(rows, generator=generator) @ self.deviations / math.sqrt(rows - 1)
        return self.mean + math.sqrt(self.scale) * noise


class SnapshotMoments(Observer):
    """Mean, variance and last deviations of the weights, sampled at a regular interval to a training's last step."""

    def __init__(self, network: nn.Module, configuration: str, *, rank: int, snapshots: int, share: float) -> None:
        self.configuration = configuration
        self._network, self._rank, self._snapshots, self._share = network, rank, snapshots, share
        self._count = 0
        self._mean = torch.zeros_like(flat_weights(network), device="cpu")
        self._squares = torch.zeros_like(self._mean)
        self._deviations = self._mean.new_zeros(0, len(self._mean))

    def after_step(self, done: int, total: int, lr: float) -> None:
        """Take a snapshot where one is due.

        Raises:
            UncertaintyError: there will be too few.
        """
        span = math.ceil(total * self._share)
        _refuse_few(span)
        interval = max(1, span // self._snapshots)
        if total - done >= span or (total - done) % interval:
            return
        weights = flat_weights(self._network).cpu()
        self._count += 1
        before = weights - self._mean
        self._mean += before / self._count
        deviation = weights - self._mean
        self._squares.addcmul_(before, deviation)
        if self._rank:
            self._deviations = torch.cat([self._deviations, deviation.unsqueeze(0)])[-self._rank :]

    def state_dict(self) -> dict[str, Tensor]:
        """Mean (P,), sum of squared deviations (P,), last deviations (rank, P) from the mean at their time, count."""
        return {
            "mean": self._mean.clone(),
            "squares": self._squares.clone(),
            "deviations": self._deviations.clone(),
            "snapshots": torch.tensor(self._count),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what was held."""
        self._mean, self._squares = state["mean"].clone(), state["squares"].clone()
        self._deviations, self._count = state["deviations"].clone(), int(state["snapshots"])


def _refuse_few(snapshots: int) -> None:
    if snapshots < 2:
        raise UncertaintyError(
            f"swag has {snapshots} step to take a snapshot of, and a spread needs 2: train for more epochs, with a "
            "smaller batch, or over a larger share of them (--uq-option share=, or SWAG(share=))"
        )


@dataclass(frozen=True)
class SWAG(DrawnWeights):
    """Weights drawn from a Gaussian fitted to a training's last weights (Maddox et al. 2019).

    At least `snapshots` are taken in the last `share` of the steps. The covariance is `scale` times the sum of the
    diagonal and of the low-rank part from the last `rank` snapshots, or from all where a short training gives fewer;
    rank 0 leaves the diagonal alone, whose scale in the paper is 1. One sample is the mean of the
    weights, as in stochastic weight averaging (Izmailov et al. 2018); scales and shifts of batch norm are the last.
    """

    rank: int = 20
    scale: float = 0.5
    snapshots: int = 40
    share: float = 0.5

    name = "swag"
    trained_apart: ClassVar[bool] = True
    watches: ClassVar[bool] = True
    lr_schedule: ClassVar[str] = "hold"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 0 or self.rank == 1:
            raise InputError(f"rank={self.rank}: expected 0 (diagonal) or at least 2")
        if not (isinstance(self.scale, int | float) and 0 <= self.scale < math.inf):
            raise InputError(f"scale={self.scale}: swag expects a number of 0 or more")
        if self.snapshots < max(2, self.rank):
            raise InputError(f"snapshots={self.snapshots}: expected at least {max(2, self.rank)}, for rank {self.rank}")
        if not 0 < self.share <= 1:
            raise InputError(f"share={self.share}: expected a share of the training's steps, above 0 and up to 1")

    def check(self, model: nn.Module, origin: Origin, splits: Splits, steps: int) -> None:
        """Refuse a training with too few steps to take snapshots of."""
        super().check(model, origin, splits, steps)
        _refuse_few(math.ceil(steps * self.share))

    def observer(self, network: nn.Module) -> Observer:
        """The moments."""
        return SnapshotMoments(network, repr(self), rank=self.rank, snapshots=self.snapshots, share=self.share)

    def distribution(self, network: nn.Module, trained: Trained) -> tuple[WeightDistribution, dict[str, object]]:
        """The fitted Gaussian.

        Raises:
            UncertaintyError: fewer than two snapshots.
        """
        observed = require_observed(self.name, trained, "mean", "squares", "deviations", "snapshots")
        count = int(observed["snapshots"])
        _refuse_few(count)
        deviations = observed["deviations"][-self.rank :] if self.rank else observed["deviations"][:0]
        return (
            SwagGaussian(observed["mean"], observed["squares"] / count, deviations, self.scale),
            {"snapshots": count, "rank": len(deviations)},
        )

    def describe(self, model: nn.Module, origin: Origin) -> dict[str, object]:
        """Members and cost."""
        return {**super().describe(model, origin), "training_copies": 2 + self.rank}
