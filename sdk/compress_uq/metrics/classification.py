"""How often a classifier is right, and how likely it finds the truth."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from compress_uq.metrics.arrays import Floats, Ints, checked

__all__ = ["accuracy", "brier", "f1_macro", "nll", "per_class_accuracy"]


def accuracy(probabilities: ArrayLike | Any, labels: ArrayLike | Any) -> float:
    """Share of images whose most probable class is the label; 0 to 1."""
    p, y = checked(probabilities, labels)
    return float((p.argmax(1) == y).mean())


def per_class_accuracy(probabilities: ArrayLike | Any, labels: ArrayLike | Any) -> Floats:
    """Accuracy (K,) among the images of each class (recall); NaN for a class without images."""
    p, y = checked(probabilities, labels)
    right = np.bincount(y, weights=p.argmax(1) == y, minlength=p.shape[1])
    count = np.bincount(y, minlength=p.shape[1])
    return np.where(count > 0, right / np.maximum(count, 1), np.nan)


def f1_macro(probabilities: ArrayLike | Any, labels: ArrayLike | Any) -> float:
    """Mean over classes of 2 TP / (2 TP + FP + FN); classes neither present nor predicted are left out."""
    p, y = checked(probabilities, labels)
    return f1_of(p.argmax(1), y, p.shape[1])


def f1_of(predicted: Ints, labels: Ints, classes: int) -> float:
    """Macro F1 from predicted and true classes (N,)."""
    hits = np.bincount(labels[predicted == labels], minlength=classes)
    total = np.bincount(labels, minlength=classes) + np.bincount(predicted, minlength=classes)
    return float((2 * hits[total > 0] / total[total > 0]).mean())


def nll(probabilities: ArrayLike | Any, labels: ArrayLike | Any) -> float:
    """Mean of -log p[label] in nats; probabilities below 1e-12 count as 1e-12."""
    p, y = checked(probabilities, labels)
    return float(nll_terms(p, y).mean())


def nll_terms(probabilities: Floats, labels: Ints) -> Floats:
    """-log p[label] of each image (N,)."""
    return -np.log(np.maximum(probabilities[np.arange(len(labels)), labels], 1e-12))


def brier(probabilities: ArrayLike | Any, labels: ArrayLike | Any) -> float:
    """Mean of sum_k (p_k - [k = label])^2; 0 to 2 (Brier 1950; scikit-learn halves it for two classes)."""
    p, y = checked(probabilities, labels)
    return float(brier_terms(p, y).mean())


def brier_terms(probabilities: Floats, labels: Ints) -> Floats:
    """sum_k (p_k - [k = label])^2 of each image (N,)."""
    true = probabilities[np.arange(len(labels)), labels]
    terms: Floats = (probabilities**2).sum(1) - 2 * true + 1
    return terms
