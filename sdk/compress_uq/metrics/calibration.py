"""How far confidence is from accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from compress_uq.errors import InputError
from compress_uq.metrics.arrays import Floats, checked

__all__ = ["ReliabilityBins", "ece", "reliability"]


@dataclass(frozen=True)
class ReliabilityBins:
    """Bins of equal width over confidence 0..1; empty bins hold 0."""

    count: Floats
    confidence: Floats
    """Mean confidence in each bin (B,)."""
    accuracy: Floats
    """Accuracy in each bin (B,)."""

    @property
    def ece(self) -> float:
        """sum_b n_b / N |accuracy_b - confidence_b|."""
        return float((self.count * np.abs(self.accuracy - self.confidence)).sum() / self.count.sum())


def ece(probabilities: ArrayLike | Any, labels: ArrayLike | Any, *, bins: int = 15) -> float:
    """Expected calibration error of the top label, equal-width bins [a, b), the last closed; 0 to 1.

    Guo et al. 2017, equation 3. netcal agrees for three classes or more; it reads one column, or two, as p(y = 1).
    """
    return reliability(probabilities, labels, bins=bins).ece


def reliability(probabilities: ArrayLike | Any, labels: ArrayLike | Any, *, bins: int = 15) -> ReliabilityBins:
    """What a reliability diagram shows.

    Raises:
        InputError: no bins.
    """
    p, y = checked(probabilities, labels)
    return reliability_of(p.max(1), p.argmax(1) == y, bins)


def reliability_of(confidence: Floats, correct: Any, bins: int) -> ReliabilityBins:
    """Bins from confidences (N,) and whether each image was right (N,)."""
    if bins < 1:
        raise InputError(f"bins={bins}: expected 1 or more")
    place = np.clip((confidence * bins).astype(np.int64), 0, bins - 1)
    count = np.bincount(place, minlength=bins).astype(np.float64)
    size = np.maximum(count, 1)
    return ReliabilityBins(
        count,
        np.bincount(place, weights=confidence, minlength=bins) / size,
        np.bincount(place, weights=correct, minlength=bins) / size,
    )
