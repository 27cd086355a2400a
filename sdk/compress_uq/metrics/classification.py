"""How often a classifier is right, and how likely it finds the truth."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from compress_uq.metrics.arrays import Columns, Floats, checked
from compress_uq.metrics.order import Groups
from compress_uq.metrics.ranking import retained_count

__all__ = ["accuracy", "brier", "f1_at", "f1_macro", "f1_per_class", "nll", "per_class_accuracy"]


def accuracy(probabilities: ArrayLike | Any, labels: ArrayLike | Any) -> float:
    """Share of images whose most probable class is the label; 0 to 1."""
    return float(1 - checked(probabilities, labels).wrong.mean())


def per_class_accuracy(probabilities: ArrayLike | Any, labels: ArrayLike | Any) -> Floats:
    """Accuracy (K,) among the images of each class (recall); NaN for a class without images."""
    c = checked(probabilities, labels)
    right = np.bincount(c.labels[~c.wrong], minlength=c.classes)
    count = np.bincount(c.labels, minlength=c.classes)
    return np.where(count > 0, right / np.maximum(count, 1), np.nan)


def f1_per_class(
    probabilities: ArrayLike | Any,
    labels: ArrayLike | Any,
    uncertainty: ArrayLike | Any = None,
    *,
    retained: float = 1.0,
) -> Floats:
    """2 TP / (2 TP + FP + FN) of each class (K,), 0 to 1, among the share `retained` of images that are most certain.

    NaN for a class neither present nor predicted there (scikit-learn says 0 if asked for it). Of images that tie at the
    border each counts by the share of them that is kept.

    Raises:
        InputError: `retained` is not above 0 and at most 1.
        DataError: arrays that do not fit, or that are no probabilities, labels or scores.
    """
    c = checked(probabilities, labels)
    u = c.uncertainty(uncertainty)
    count = retained_count(len(u), retained)
    border = np.partition(u, count - 1)[count - 1]
    inside, tied = u < border, u == border
    weights = inside + tied * ((count - inside.sum()) / tied.sum())
    return ClassCounts(c).f1(weights)


def f1_macro(probabilities: ArrayLike | Any, labels: ArrayLike | Any) -> float:
    """Mean of F1 over the classes that are present or predicted; 0 to 1. scikit-learn's `average="macro"`."""
    return macro(f1_per_class(probabilities, labels))


def f1_at(
    probabilities: ArrayLike | Any,
    labels: ArrayLike | Any,
    uncertainty: ArrayLike | Any = None,
    *,
    retained: float = 0.5,
) -> float:
    """Macro F1 of the share `retained` of images that are most certain; 0 to 1 (Aguettaz retains a half).

    Raises:
        InputError: `retained` is not above 0 and at most 1.
        DataError: arrays that do not fit, or that are no probabilities, labels or scores.
    """
    return macro(f1_per_class(probabilities, labels, uncertainty, retained=retained))


def nll(probabilities: ArrayLike | Any, labels: ArrayLike | Any) -> float:
    """Mean of -log p[label] in nats; 0 to 27.6, since probabilities below 1e-12 count as 1e-12."""
    return float(checked(probabilities, labels).nll.mean())


def brier(probabilities: ArrayLike | Any, labels: ArrayLike | Any) -> float:
    """Mean of sum_k (p_k - [k = label])^2; 0 to 2 (Brier 1950; scikit-learn halves it for two classes)."""
    return float(checked(probabilities, labels).brier.mean())


class ClassCounts:
    """Which classes each image (N,) is a hit or a miss of, for F1 under any weights."""

    def __init__(self, columns: Columns) -> None:
        right, wrong = np.flatnonzero(~columns.wrong), np.flatnonzero(columns.wrong)
        self.hits = Groups(right, columns.labels[right], columns.classes)
        missed_of = np.concatenate([columns.labels[wrong], columns.predicted[wrong]])
        self.misses = Groups(np.concatenate([wrong, wrong]), missed_of, columns.classes)

    def f1(self, weights: Floats) -> Floats:
        """F1 of each class (K,), each image counted `weights` (N,) times; NaN for a class that none of them has."""
        hits = 2 * self.hits.sums(weights)
        total = hits + self.misses.sums(weights)
        f1: Floats = np.divide(hits, total, out=np.full(len(hits), np.nan), where=total > 0)
        return f1


def macro(of_classes: Floats) -> float:
    """Mean over the classes that have a figure."""
    return float(of_classes[~np.isnan(of_classes)].mean())
