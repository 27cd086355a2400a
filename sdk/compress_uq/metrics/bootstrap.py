"""The report card's figures, and their 95 % bootstrap intervals.

A resample of images is how often each was drawn: it reweights orders, bins and sums that were found once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress_uq.metrics.arrays import Columns, Ints, checked
from compress_uq.metrics.calibration import width_bin
from compress_uq.metrics.classification import ClassCounts, macro
from compress_uq.metrics.ood import ood_ranking
from compress_uq.metrics.order import Groups, Ranking, Weighed
from compress_uq.metrics.ranking import retained_count, risk_of_first, sparsification_error

__all__ = [
    "RESAMPLES",
    "Figure",
    "classification_figures",
    "classification_metrics",
    "mean_figure",
    "ood_figures",
    "wilson",
]

RESAMPLES = 1000
_BINS = 15


@dataclass(frozen=True)
class Figure:
    """A value and its 95 % interval, which contains it."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        """Plain values; an undefined figure is null."""
        return {k: None if math.isnan(v) else v for k, v in vars(self).items()}


def classification_metrics(probabilities: Any, labels: Any, uncertainty: Any = None) -> dict[str, float]:
    """Every metric of the report card that needs no OOD set, without intervals; an undefined one is NaN.

    Args:
        probabilities: (N, K).
        labels: (N,).
        uncertainty: (N,) the score that ranks; 1 - max p if None.

    Raises:
        DataError: arrays that do not fit, or that are no probabilities, labels or scores.
    """
    images = _Images(checked(probabilities, labels), uncertainty)
    return images.metrics(np.ones(images.count, np.int64))


def classification_figures(
    probabilities: Any, labels: Any, uncertainty: Any = None, *, seed: int = 0
) -> dict[str, Figure]:
    """The same with intervals: percentiles of 1,000 resamples of the images, but for two.

    Resampling makes ECE larger, by as much as the draw of the images had made it larger before, so that percentiles
    lie above what a calibrated model has: its interval is reflected about the value (the basic bootstrap, Davison and
    Hinkley 1997, section 5.2.1). Accuracy has the Wilson interval, which does not shrink to a point where all is right.

    Args:
        probabilities: (N, K).
        labels: (N,).
        uncertainty: (N,) the score that ranks; 1 - max p if None.
        seed: draws the resamples of images; the same seed and N give the same ones, so that columns are comparable.

    Raises:
        DataError: arrays that do not fit, or that are no probabilities, labels or scores.
    """
    images = _Images(checked(probabilities, labels), uncertainty)
    random = np.random.default_rng(seed)
    drawn = [images.metrics(_resample(random, images.count)) for _ in range(RESAMPLES)]
    values = images.metrics(np.ones(images.count, np.int64))
    figures = _figures(values, drawn)
    return {
        **figures,
        "accuracy": wilson(values["accuracy"], images.count),
        "ece": _reflected(values["ece"], [d["ece"] for d in drawn]),
    }


def ood_figures(in_scores: Any, out_scores: Any, *, seed: int = 0) -> dict[str, Figure]:
    """AUROC, AUPR and FPR95 of a score, out-of-distribution positive; both sets are resampled.

    Raises:
        DataError: either set is empty, or holds NaN or infinity.
    """
    ranking = ood_ranking(in_scores, out_scores)
    out = len(ranking.places)
    counts = (len(ranking.order) - out, out)
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(RESAMPLES):
        weights = np.concatenate([_resample(random, count) for count in counts])
        drawn.append(_ood_metrics(ranking.weighed(weights)))
    return _figures(_ood_metrics(ranking.weighed()), drawn)


def mean_figure(figures: list[Figure]) -> Figure:
    """The mean of several figures; its interval is the mean of theirs, which is on the wide side."""
    return Figure(*(float(np.mean([getattr(f, part) for f in figures])) for part in ("value", "low", "high")))


def wilson(share: float, count: int, z: float = 1.96) -> Figure:
    """A share of so many images with its Wilson interval; NaN of none."""
    if count == 0:
        return Figure(float("nan"), float("nan"), float("nan"))
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * float(np.sqrt(share * (1 - share) / count + z * z / (4 * count * count)))
    return Figure(share, min(share, centre - half), max(share, centre + half))


class _Images:
    """What does not change from one resample to the next."""

    def __init__(self, columns: Columns, uncertainty: Any) -> None:
        self.count = len(columns.labels)
        self.by_uncertainty = Ranking(columns.uncertainty(uncertainty), columns.wrong)
        self.by_oracle = Ranking(columns.oracle, columns.wrong)
        self.means = np.stack([columns.nll, columns.brier])
        self.gap = ~columns.wrong - columns.confidence
        self.bins = Groups(np.arange(self.count), width_bin(columns.confidence, _BINS), _BINS)
        self.classes = ClassCounts(columns)

    def metrics(self, counts: Ints) -> dict[str, float]:
        """Each image counted `counts` (N,) times, N in all."""
        weights = counts.astype(np.float64)
        ranked, best = self.by_uncertainty.weighed(counts), self.by_oracle.weighed(counts)
        nll, brier = (self.means @ weights / self.count).tolist()
        area = ranked.area()
        return {
            "accuracy": 1 - ranked.positive / self.count,
            "nll": nll,
            "brier": brier,
            "ece": float(np.abs(self.bins.sums(self.gap * weights)).sum() / self.count),
            "ause": sparsification_error(ranked, best),
            "ause_exact": area - best.area(),
            "aurc": area,
            "error_auroc": ranked.auroc(),
            "accuracy_at_50": 1 - risk_of_first(ranked, retained_count(self.count, 0.5)),
            "f1_macro": macro(self.classes.f1(weights)),
        }


def _ood_metrics(ranked: Weighed) -> dict[str, float]:
    return {
        "auroc": ranked.auroc(),
        "aupr": ranked.average_precision(),
        "fpr95": ranked.false_positive_rate(0.95),
    }


def _resample(random: np.random.Generator, count: int) -> Ints:
    """How often each of `count` images is drawn in as many draws."""
    return np.bincount(random.integers(0, count, count), minlength=count)


def _figures(values: dict[str, float], drawn: list[dict[str, float]]) -> dict[str, Figure]:
    return {name: _figure(value, [d[name] for d in drawn]) for name, value in values.items()}


def _figure(value: float, drawn: list[float]) -> Figure:
    """The percentile interval, widened to contain the value where a biased metric leaves it outside."""
    defined = [v for v in drawn if not math.isnan(v)]
    if math.isnan(value) or not defined:
        return Figure(value, value, value)
    low, high = np.percentile(defined, [2.5, 97.5])
    return Figure(value, min(float(low), value), max(float(high), value))


def _reflected(value: float, drawn: list[float]) -> Figure:
    """The basic interval of a metric that is 0 at least, widened to contain the value."""
    low, high = 2 * value - np.percentile(drawn, [97.5, 2.5])
    return Figure(value, max(0.0, min(float(low), value)), max(float(high), value))
