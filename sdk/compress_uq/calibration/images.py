"""The images that a calibrator is fitted on: what they must be, how they are divided, and what members say of them."""

from __future__ import annotations

import numpy as np
from scipy.special import softmax

from compress_uq.errors import CalibrationError

__all__ = [
    "label_nll",
    "log_mean",
    "mean_probabilities",
    "refuse_few",
    "refuse_missing_classes",
    "refuse_unusable",
    "spread_folds",
]

TINY = 1e-12
"""Probabilities below count as this."""

_SHOWN = 5


def refuse_unusable(name: str, logits: np.ndarray, labels: np.ndarray) -> None:
    """Refuse what no calibrator can be fitted on.

    Raises:
        CalibrationError: no images, fewer than classes, labels that do not fit, NaN or infinite logits.
    """
    if logits.ndim != 3 or labels.ndim != 1 or logits.shape[1] != len(labels):
        raise CalibrationError(
            f"calibration {name!r}: logits {logits.shape} and labels {labels.shape}, expected (T, N, K) and (N,)"
        )
    _, count, classes = logits.shape
    if count == 0:
        raise CalibrationError(f"calibration {name!r} has no images to fit on: give a calibration split")
    bad = count - int(np.isfinite(logits).all((0, 2)).sum())
    if bad:
        raise CalibrationError(
            f"the logits of {bad} of {count} calibration images are NaN or infinite: look at the model's weights and "
            "these images before calibrating"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise CalibrationError(f"labels from {labels.min()} to {labels.max()}: expected 0 to {classes - 1}")
    refuse_few(count, classes)


def refuse_few(count: int, classes: int) -> None:
    """Refuse fewer images than classes.

    Raises:
        CalibrationError: says how many are needed.
    """
    if count < classes:
        raise CalibrationError(
            f"{count} calibration images for {classes} classes are too few: give at least {classes}, or calibration "
            "'none'"
        )


def refuse_missing_classes(name: str, labels: np.ndarray, classes: int) -> None:
    """Refuse a split in which a class has no image.

    Raises:
        CalibrationError: names the classes.
    """
    missing = np.flatnonzero(np.bincount(labels, minlength=classes) == 0)
    if len(missing):
        shown = ", ".join(str(k) for k in missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
        raise CalibrationError(
            f"calibration {name!r} needs images of every class, and the calibration split has none of class {shown}: "
            "give some, or calibration 'temperature'"
        )


def mean_probabilities(logits: np.ndarray) -> np.ndarray:
    """The mean over members of softmax (N, K) float64, from logits (T, N, K)."""
    total: np.ndarray = np.zeros(logits.shape[1:])
    for member in logits:
        total += softmax(member.astype(np.float64), axis=1)
    total /= len(logits)
    return total


def log_mean(logits: np.ndarray) -> np.ndarray:
    """The logarithm of the mean over members (N, K) float64, of probabilities of at least 1e-12."""
    log_p: np.ndarray = np.log(np.maximum(mean_probabilities(logits), TINY))
    return log_p


def label_nll(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """-log p[label] of each image (N,), nats; probabilities below 1e-12 count as 1e-12."""
    terms: np.ndarray = -np.log(np.maximum(probabilities[np.arange(len(labels)), labels], TINY))
    return terms


def spread_folds(labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """The fold of each image (N,), 0 to folds - 1: every class is spread over the folds as evenly as it goes."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    fold = np.empty(len(labels), np.int64)
    fold[order] = np.arange(len(labels)) % folds
    return fold
