"""Two source papers' own definitions, where they differ from those of the report card.

They are here to set figures beside printed ones. Variance of a logit says how large logits are before it says how
unsure members are, so it can rank errors worse than a random order does; min-max ECE then mostly measures accuracy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from compress_uq.errors import DataError
from compress_uq.metrics.arrays import Floats, as_array, checked, scores
from compress_uq.metrics.calibration import reliability_of
from compress_uq.metrics.ood import ood_aupr_in, ood_fpr95_in

__all__ = ["logit_variance", "mean_logit_softmax", "min_max_ece", "pooled_ece", "tradi_aupr", "tradi_fpr95"]


def mean_logit_softmax(logits: ArrayLike | Any) -> Floats:
    """Softmax (N, K) of the mean over members of their logits (M, N, K): Holzbock's Equation 6.

    The report card averages probabilities.

    Raises:
        DataError: not (M, N, K), or NaN or infinity among the logits.
    """
    mean = _logits(logits).mean(0)
    powers: Floats = np.exp(mean - mean.max(1, keepdims=True))
    softmax: Floats = powers / powers.sum(1, keepdims=True)
    return softmax


def logit_variance(logits: ArrayLike | Any) -> Floats:
    """Variance (N,), ddof 0, over members of the predicted class's logit, from logits (M, N, K): Holzbock's Equation 6.

    The predicted class is that of the mean logit. 0 and up, without a bound.

    Raises:
        DataError: not (M, N, K), or NaN or infinity among the logits.
    """
    z = _logits(logits)
    label = z.mean(0).argmax(1)
    variance: Floats = z[:, np.arange(len(label)), label].var(0)
    return variance


def min_max_ece(
    probabilities: ArrayLike | Any, labels: ArrayLike | Any, variance: ArrayLike | Any, *, bins: int = 15
) -> float:
    """ECE whose confidence is 1 - (v - min v) / (max v - min v): Holzbock's section 6.1; 0 to 1.

    One image with a large variance moves all the others towards confidence 1, and the value towards 1 - accuracy.

    Raises:
        DataError: the variances are all equal, or arrays that do not fit.
        InputError: no bins.
    """
    c = checked(probabilities, labels)
    v = scores(variance, "variance", len(c.labels))
    if v.min() == v.max():
        raise DataError(f"variance is {v[0]:.6g} for every image: min-max scaling needs two different values")
    return reliability_of(1 - (v - v.min()) / (v.max() - v.min()), ~c.wrong, bins).ece


def pooled_ece(
    in_probabilities: ArrayLike | Any, in_labels: ArrayLike | Any, out_probabilities: ArrayLike | Any, *, bins: int = 15
) -> float:
    """ECE over in- and out-of-distribution images together, every OOD image counted as wrong: TRADI's; 0 to 1.

    It depends on the share of OOD images and is large for any classifier that is confident on them.

    Raises:
        DataError: arrays that do not fit, either set empty, or rows that are no probabilities.
        InputError: no bins.
    """
    known = checked(in_probabilities, in_labels)
    unknown = checked(out_probabilities, np.zeros(len(as_array(out_probabilities)), np.int64))
    if known.classes != unknown.classes:
        raise DataError(f"{known.classes} classes in-distribution and {unknown.classes} out: expected one classifier's")
    confidence = np.concatenate([known.confidence, unknown.confidence])
    correct = np.concatenate([~known.wrong, np.zeros(len(unknown.labels), bool)])
    return reliability_of(confidence, correct, bins).ece


def tradi_aupr(in_scores: ArrayLike | Any, out_scores: ArrayLike | Any) -> float:
    """AUPR with in-distribution positive; scores as everywhere here, higher is more OOD."""
    return ood_aupr_in(in_scores, out_scores)


def tradi_fpr95(in_scores: ArrayLike | Any, out_scores: ArrayLike | Any) -> float:
    """TRADI's FPR-95%-TPR, in-distribution positive; scores as everywhere here, higher is more OOD."""
    return ood_fpr95_in(in_scores, out_scores)


def _logits(logits: Any) -> NDArray[Any]:
    z = as_array(logits)
    if z.ndim != 3 or z.size == 0:
        raise DataError(f"logits {z.shape}: expected (M, N, K), none of them empty")
    if not np.isfinite(z).all():
        raise DataError("logits hold NaN or infinite values")
    return z.astype(np.float64)
