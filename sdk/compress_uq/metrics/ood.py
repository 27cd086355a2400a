"""How well a score tells out-of-distribution images from in-distribution ones; a higher score is more OOD.

OOD is the positive class, unless a name ends in `_in`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from compress_uq.metrics.arrays import scores
from compress_uq.metrics.order import Ranking

__all__ = ["ood_aupr", "ood_aupr_in", "ood_auroc", "ood_fpr95", "ood_fpr95_in"]

_RECALL = 0.95


def ood_auroc(in_scores: ArrayLike | Any, out_scores: ArrayLike | Any) -> float:
    """Probability that an OOD image scores higher than an in-distribution one, ties half; 0 to 1.

    The same whichever class is positive. From ranks: torchmetrics squashes scores outside 0..1 by a sigmoid first.

    Raises:
        DataError: either set is empty, or holds NaN or infinity.
    """
    return ood_ranking(in_scores, out_scores).weighed().auroc()


def ood_aupr(in_scores: ArrayLike | Any, out_scores: ArrayLike | Any) -> float:
    """Average precision with OOD positive (AUPR-OUT): sum over thresholds of recall gained times precision; 0 to 1.

    It depends on the share of OOD images, which is what a useless score gets. scikit-learn's
    `average_precision_score`: images that tie are flagged together, and nothing is interpolated.

    Raises:
        DataError: either set is empty, or holds NaN or infinity.
    """
    return ood_ranking(in_scores, out_scores).weighed().average_precision()


def ood_aupr_in(in_scores: ArrayLike | Any, out_scores: ArrayLike | Any) -> float:
    """Average precision with in-distribution positive (AUPR-IN), the lowest scores first; 0 to 1. See `ood_aupr`.

    Raises:
        DataError: either set is empty, or holds NaN or infinity.
    """
    return _in_positive(in_scores, out_scores).weighed().average_precision()


def ood_fpr95(in_scores: ArrayLike | Any, out_scores: ArrayLike | Any) -> float:
    """Share of in-distribution images flagged at the threshold that flags at least 95 % of the OOD images; 0 to 1.

    OOD positive, as in OpenOOD, pytorch-ood and torch-uncertainty. `ood_fpr95_in` is the other convention.

    Raises:
        DataError: either set is empty, or holds NaN or infinity.
    """
    return ood_ranking(in_scores, out_scores).weighed().false_positive_rate(_RECALL)


def ood_fpr95_in(in_scores: ArrayLike | Any, out_scores: ArrayLike | Any) -> float:
    """Share of OOD images let in at the threshold that lets in at least 95 % of the in-distribution images; 0 to 1.

    In-distribution positive, as in ODIN (Liang et al. 2018) and TRADI's slides.

    Raises:
        DataError: either set is empty, or holds NaN or infinity.
    """
    return _in_positive(in_scores, out_scores).weighed().false_positive_rate(_RECALL)


def ood_ranking(in_scores: ArrayLike | Any, out_scores: ArrayLike | Any) -> Ranking:
    """In-distribution images, then OOD images, in the order of their scores; OOD positive."""
    low, high = scores(in_scores, "in_scores"), scores(out_scores, "out_scores")
    return Ranking(np.concatenate([low, high]), np.arange(len(low) + len(high)) >= len(low))


def _in_positive(in_scores: ArrayLike | Any, out_scores: ArrayLike | Any) -> Ranking:
    return ood_ranking(-scores(out_scores, "out_scores"), -scores(in_scores, "in_scores"))
