"""How well a score tells out-of-distribution images, the positive class, from in-distribution ones."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import average_precision_score

from compress_uq.metrics.arrays import floats
from compress_uq.metrics.ranking import auroc

__all__ = ["ood_aupr", "ood_auroc", "ood_fpr95"]


def ood_auroc(in_scores: ArrayLike | Any, out_scores: ArrayLike | Any) -> float:
    """Probability that an OOD image scores higher than an in-distribution one, ties half."""
    low, high = floats(in_scores, "in_scores").reshape(-1), floats(out_scores, "out_scores").reshape(-1)
    return auroc(np.concatenate([low, high]), np.arange(len(low) + len(high)) >= len(low))


def ood_aupr(in_scores: ArrayLike | Any, out_scores: ArrayLike | Any) -> float:
    """Average precision with OOD positive; it depends on the share of OOD images."""
    low, high = floats(in_scores, "in_scores").reshape(-1), floats(out_scores, "out_scores").reshape(-1)
    truth = np.arange(len(low) + len(high)) >= len(low)
    return float(average_precision_score(truth, np.concatenate([low, high])))


def ood_fpr95(in_scores: ArrayLike | Any, out_scores: ArrayLike | Any) -> float:
    """Share of in-distribution images flagged at the threshold that flags at least 95 % of the OOD images.

    TRADI's slides print the other convention, in-distribution positive.
    """
    low, high = floats(in_scores, "in_scores").reshape(-1), floats(out_scores, "out_scores").reshape(-1)
    threshold = np.sort(high)[int(np.floor(0.05 * len(high) + 1e-9))]
    return float((low >= threshold).mean())
