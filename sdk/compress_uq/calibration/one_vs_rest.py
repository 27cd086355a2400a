"""Calibrators that look at each class alone, against the rest, and then make rows sum to one."""

from __future__ import annotations

from abc import abstractmethod
from typing import Self

import numpy as np
import torch
from torch import Tensor

from compress_uq.calibration.base import Calibrator
from compress_uq.calibration.images import TINY, mean_probabilities
from compress_uq.calibration.netcal_fits import beta_fit, histogram_fit, isotonic_fit, refuse_without_netcal

__all__ = ["Beta", "Histogram", "Isotonic", "OneVsRest"]

_BINS = 15


class OneVsRest(Calibrator):
    """A curve for each class from its mean probability to its frequency, normalised over classes (Zadrozny 2002).

    A row whose classes all come out as 0 stays as it was.
    """

    every_class = True

    @classmethod
    def refuse_unavailable(cls) -> None:
        """Refuse to go on without netcal, which does the fitting."""
        refuse_without_netcal()

    @abstractmethod
    def values(self, mean: Tensor) -> Tensor:
        """What each class's curve says of the mean (N, K), before normalising: (N, K), not negative."""

    def probabilities(self, mean: Tensor) -> Tensor:
        """The mean over members (N, K), calibrated."""
        self.require_fitted()
        values = self.values(mean)
        total = values.sum(1, keepdim=True)
        empty = total <= 0
        return torch.where(empty, mean, values / torch.where(empty, 1.0, total))


class Histogram(OneVsRest):
    """The frequency of the class among calibration images of the same bin, 15 of equal width (Zadrozny 2001).

    With many classes most probabilities share the lowest bin, and normalising flattens the rest: for few classes.
    """

    name = "histogram"
    needs = ("edges", "values_of_bins")
    edges: Tensor
    """(B + 1,) of the bins; a probability on an edge belongs below."""
    values_of_bins: Tensor
    """(K, B)"""

    @classmethod
    def _fit(cls, logits: np.ndarray, labels: np.ndarray) -> Self:
        p = mean_probabilities(logits)
        fits = [histogram_fit(p[:, k], (labels == k).astype(np.int64), _BINS) for k in range(p.shape[1])]
        edges = _rounded_down(fits[0][0])
        edges[0], edges[-1] = -1.0, 2.0
        return cls(edges=edges, values_of_bins=torch.tensor(np.stack([v for _, v in fits]), dtype=torch.float32))

    def values(self, mean: Tensor) -> Tensor:
        """The value of the bin that each probability lies in."""
        p = mean.unsqueeze(2)
        inside = (p > self.edges[:-1]) & (p <= self.edges[1:])
        return (inside.to(mean.dtype) * self.values_of_bins).sum(2)


class Isotonic(OneVsRest):
    """The best rising curve through calibration images, interpolated (Zadrozny 2002).

    The curve is a sum of ramps: each climbs by `rise` between `start` and `start + 1 / slope`.
    """

    name = "isotonic"
    needs = ("first", "start", "slope", "rise")
    first: Tensor
    """(K,) the curve's lowest value."""
    start: Tensor
    """(K, M), as is the rest; ramps that a class does not have rise by 0."""
    slope: Tensor
    rise: Tensor

    @classmethod
    def _fit(cls, logits: np.ndarray, labels: np.ndarray) -> Self:
        # What the curve will see is float32: its corners must be values that float32 can tell apart.
        p = np.maximum(mean_probabilities(logits), TINY).astype(np.float32).astype(np.float64)
        curves = [isotonic_fit(p[:, k], (labels == k).astype(np.int64)) for k in range(p.shape[1])]
        ramps = [_ramps(x, y) for x, y in curves]
        most = max(1, *(ramp.shape[1] for ramp in ramps))
        table = np.stack([np.pad(ramp, ((0, 0), (0, most - ramp.shape[1]))) for ramp in ramps], axis=1)
        start, slope, rise = torch.tensor(table, dtype=torch.float32)
        first = torch.tensor([y[0] for _, y in curves], dtype=torch.float32)
        return cls(first=first, start=start.clone(), slope=slope.clone(), rise=rise.clone())

    def values(self, mean: Tensor) -> Tensor:
        """The curve of each class at its probability."""
        climbed = ((mean.clamp_min(TINY).unsqueeze(2) - self.start) * self.slope).clamp(0, 1)
        return self.first + (climbed * self.rise).sum(2)


class Beta(OneVsRest):
    """sigmoid(a log p - b log(1 - p) + c) for each class, a and b not negative (Kull et al. 2017, section 3).

    Fitted to Platt's targets in place of 0 and 1, (n + 1) / (n + 2) and 1 / (n + 2), without which a class that is
    told apart perfectly has no optimum.
    """

    name = "beta"
    needs = ("a", "b", "c")
    a: Tensor
    """(K,), as are the others."""
    b: Tensor
    c: Tensor

    @classmethod
    def _fit(cls, logits: np.ndarray, labels: np.ndarray) -> Self:
        p = np.clip(mean_probabilities(logits), TINY, 1 - TINY)
        fits = [beta_fit(p[:, k], platt_targets(labels == k)) for k in range(p.shape[1])]
        a, b, c = torch.tensor(fits, dtype=torch.float32).T
        return cls(a=a.clone(), b=b.clone(), c=c.clone())

    def values(self, mean: Tensor) -> Tensor:
        """The frequency that each class's curve gives its probability."""
        # 1 - p of a p near 1 is lost to rounding; the sum of the others is not.
        rest = mean @ (1 - torch.eye(mean.shape[1], dtype=mean.dtype, device=mean.device))
        odds = self.a * mean.clamp_min(TINY).log() - self.b * rest.clamp_min(TINY).log() + self.c
        return torch.sigmoid(odds)


def platt_targets(hits: np.ndarray) -> np.ndarray:
    """What to fit in place of 0 and 1 (N,) float64 (Platt 1999, section 2.2)."""
    positive = int(hits.sum())
    targets: np.ndarray = np.where(hits, (positive + 1) / (positive + 2), 1 / (len(hits) - positive + 2))
    return targets


def _ramps(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Start, slope and rise (3, M) of the parts of a curve that climb."""
    climbs = np.flatnonzero(np.diff(y) > 0)
    return np.stack([x[climbs], 1 / np.diff(x)[climbs], np.diff(y)[climbs]])


def _rounded_down(edges: np.ndarray) -> Tensor:
    """In float32 and never above, so that float32 values fall on the side of each edge that they would in float64."""
    narrow = edges.astype(np.float32)
    return torch.from_numpy(np.where(narrow > edges, np.nextafter(narrow, np.float32(0)), narrow))
