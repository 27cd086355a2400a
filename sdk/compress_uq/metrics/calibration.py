"""How far confidence is from accuracy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from compress_uq.errors import InputError, UnknownNameError
from compress_uq.metrics.arrays import Bools, Floats, Ints, as_array, checked

__all__ = ["ReliabilityBins", "classwise_ece", "ece", "reliability"]

_Sums = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
"""Of each bin: images, summed confidence, images classified right."""


@dataclass(frozen=True)
class ReliabilityBins:
    """Bins over confidence, in ascending order; empty bins hold 0."""

    count: Floats
    confidence: Floats
    """Mean confidence in each bin (B,)."""
    accuracy: Floats
    """Accuracy in each bin (B,)."""

    @property
    def ece(self) -> float:
        """sum_b n_b / N |accuracy_b - confidence_b|."""
        return float((self.count * np.abs(self.accuracy - self.confidence)).sum() / self.count.sum())


def ece(probabilities: ArrayLike | Any, labels: ArrayLike | Any, *, bins: int = 15, binning: str = "width") -> float:
    """Expected calibration error of the top label: sum_b n_b / N |accuracy_b - mean confidence_b|; 0 to 1.

    Guo et al. 2017, equation 3. `binning` is `width` (bins [a, b) of equal width, the last closed) or `mass` (bins of
    equally many images, the first ones larger by one where they do not divide; Nguyen and O'Connor 2015), which
    torch-uncertainty calls adaptive. Images that tie in confidence share their accuracy, so that `mass` does not depend
    on their order. netcal agrees for three classes or more; it reads one column, or two, as p(y = 1), and takes 10 bins
    by default. Bins (a, b] elsewhere differ only where a confidence lies on an edge.

    Raises:
        InputError: no bins, or another binning.
        DataError: arrays that do not fit, or that are no probabilities or labels.
    """
    return reliability(probabilities, labels, bins=bins, binning=binning).ece


def classwise_ece(
    probabilities: ArrayLike | Any, labels: ArrayLike | Any, *, bins: int = 15, binning: str = "width"
) -> float:
    """Mean over classes k of the calibration error of p_k against [label = k]; 0 to 1.

    Kull et al. 2019. Most classes of most images have a probability near zero, so it falls with the number of classes;
    some report the sum over classes instead.

    Raises:
        InputError: no bins, or another binning.
        DataError: arrays that do not fit, or that are no probabilities or labels.
    """
    c = checked(probabilities, labels)
    columns = as_array(probabilities).T
    errors = [reliability_of(p.astype(np.float64), c.labels == k, bins, binning).ece for k, p in enumerate(columns)]
    return float(np.mean(errors))


def reliability(
    probabilities: ArrayLike | Any, labels: ArrayLike | Any, *, bins: int = 15, binning: str = "width"
) -> ReliabilityBins:
    """What a reliability diagram shows; bins as in `ece`.

    Raises:
        InputError: no bins, or another binning.
        DataError: arrays that do not fit, or that are no probabilities or labels.
    """
    c = checked(probabilities, labels)
    return reliability_of(c.confidence, ~c.wrong, bins, binning)


def reliability_of(confidence: Floats, correct: Bools, bins: int, binning: str = "width") -> ReliabilityBins:
    """Bins from confidences (N,) and whether each image was right (N,)."""
    if bins < 1:
        raise InputError(f"bins={bins}: expected 1 or more")
    if binning not in _BINNINGS:
        raise UnknownNameError("binning", binning, _BINNINGS)
    count, total, right = _BINNINGS[binning](confidence, correct, bins)
    size = np.maximum(count, 1)
    return ReliabilityBins(count.astype(np.float64), total / size, right / size)


def width_bin(confidence: Floats, bins: int) -> Ints:
    """The bin of equal width that each confidence (N,) lies in."""
    return np.clip((confidence * bins).astype(np.int64), 0, bins - 1)


def _by_width(confidence: Floats, correct: Bools, bins: int) -> _Sums:
    place = width_bin(confidence, bins)
    count = np.bincount(place, minlength=bins)
    return count, np.bincount(place, confidence, bins), np.bincount(place, correct, bins)


def _by_mass(confidence: Floats, correct: Bools, bins: int) -> _Sums:
    ordered = np.sort(confidence)
    _, tie, size = np.unique(confidence, return_inverse=True, return_counts=True)
    shared = np.repeat(np.bincount(tie, correct) / size, size)
    number, larger = divmod(len(confidence), bins)
    count = number + (np.arange(bins) < larger).astype(np.int64)
    edges = np.concatenate([[0], np.cumsum(count)])
    total, right = (np.concatenate([[0.0], np.cumsum(column)])[edges] for column in (ordered, shared))
    return count, np.diff(total), np.diff(right)


_BINNINGS: dict[str, Callable[[Floats, Bools, int], _Sums]] = {
    "width": _by_width,
    "mass": _by_mass,
}
