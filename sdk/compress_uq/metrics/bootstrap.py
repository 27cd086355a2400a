"""Figures with 95 % bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress_uq.metrics.arrays import Floats, Ints, checked, floats
from compress_uq.metrics.calibration import reliability_of
from compress_uq.metrics.classification import brier_terms, f1_of, nll_terms
from compress_uq.metrics.ood import ood_aupr, ood_auroc, ood_fpr95
from compress_uq.metrics.ranking import accuracy_at_of, aurc_of, auroc, ause_of

__all__ = ["RESAMPLES", "Figure", "classification_figures", "ood_figures"]

RESAMPLES = 500


@dataclass(frozen=True)
class Figure:
    """A value and its 95 % interval, which contains it."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        """Plain values; an undefined figure is null."""
        return {k: None if math.isnan(v) else v for k, v in vars(self).items()}


@dataclass(frozen=True)
class _Columns:
    """All that the metrics need of each image, so that a resample is a gather of short columns."""

    confidence: Floats
    wrong: Any
    uncertainty: Floats
    oracle: Floats
    nll: Floats
    brier: Floats
    predicted: Ints
    labels: Ints

    def take(self, rows: Ints) -> _Columns:
        return _Columns(*(column[rows] for column in vars(self).values()))


def classification_figures(probabilities: Any, labels: Any, uncertainty: Any, *, seed: int = 0) -> dict[str, Figure]:
    """Every metric of the report card that needs no OOD set.

    Args:
        probabilities: (N, K).
        labels: (N,).
        uncertainty: (N,) the score that ranks.
        seed: draws the resamples of images; the same seed and N give the same ones, so that columns are comparable.
    """
    p, y = checked(probabilities, labels)
    classes = p.shape[1]
    predicted = p.argmax(1)
    columns = _Columns(
        p.max(1),
        predicted != y,
        floats(uncertainty, "uncertainty"),
        1 - p[np.arange(len(y)), y],
        nll_terms(p, y),
        brier_terms(p, y),
        predicted,
        y,
    )
    measures: dict[str, Callable[[_Columns], float]] = {
        "accuracy": lambda c: float(1 - c.wrong.mean()),
        "nll": lambda c: float(c.nll.mean()),
        "brier": lambda c: float(c.brier.mean()),
        "ece": lambda c: reliability_of(c.confidence, ~c.wrong, 15).ece,
        "ause": lambda c: ause_of(c.uncertainty, c.wrong, c.oracle),
        "ause_exact": lambda c: aurc_of(c.uncertainty, c.wrong) - aurc_of(c.oracle, c.wrong),
        "aurc": lambda c: aurc_of(c.uncertainty, c.wrong),
        "error_auroc": lambda c: auroc(c.uncertainty, c.wrong),
        "accuracy_at_50": lambda c: accuracy_at_of(c.uncertainty, c.wrong, 0.5),
        "f1_macro": lambda c: f1_of(c.predicted, c.labels, classes),
    }
    values = {name: measure(columns) for name, measure in measures.items()}
    random = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(RESAMPLES):
        resample = columns.take(random.integers(0, len(y), len(y)))
        for name, measure in measures.items():
            drawn[name].append(measure(resample))
    return {name: _figure(values[name], drawn[name]) for name in measures}


def ood_figures(in_scores: Any, out_scores: Any, *, seed: int = 0) -> dict[str, Figure]:
    """AUROC, AUPR and FPR95 of a score, out-of-distribution positive."""
    low, high = floats(in_scores, "in_scores"), floats(out_scores, "out_scores")
    measures = {"auroc": ood_auroc, "aupr": ood_aupr, "fpr95": ood_fpr95}
    random = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(RESAMPLES):
        a = low[random.integers(0, len(low), len(low))]
        b = high[random.integers(0, len(high), len(high))]
        for name, measure in measures.items():
            drawn[name].append(measure(a, b))
    return {name: _figure(measure(low, high), drawn[name]) for name, measure in measures.items()}


def _figure(value: float, drawn: list[float]) -> Figure:
    """The percentile interval, widened to contain the value where a biased metric leaves it outside."""
    defined = [v for v in drawn if not math.isnan(v)]
    if math.isnan(value) or not defined:
        return Figure(value, value, value)
    low, high = np.percentile(defined, [2.5, 97.5])
    return Figure(value, min(float(low), value), max(float(high), value))


def mean_figure(figures: list[Figure]) -> Figure:
    """The mean of several figures; its interval is the mean of theirs, which is on the wide side."""
    return Figure(*(float(np.mean([getattr(f, part) for f in figures])) for part in ("value", "low", "high")))
