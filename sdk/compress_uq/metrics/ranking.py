"""How well an uncertainty ranks the errors: sparsification, risk and coverage, AUROC.

Where images tie, the value is the mean over their orders. `uncertainty` defaults to 1 - max p; higher is less certain.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import spearmanr

from compress_uq.errors import DataError, InputError
from compress_uq.metrics.arrays import Columns, Floats, checked, scores
from compress_uq.metrics.order import KEPT, STEP, Ranking, Weighed

__all__ = [
    "accuracy_at",
    "aurc",
    "ause",
    "ause_exact",
    "coverage_at_risk",
    "error_auroc",
    "random_ause",
    "risk_at_coverage",
    "sparsification_curves",
    "spearman",
]


def ause(probabilities: ArrayLike | Any, labels: ArrayLike | Any, uncertainty: ArrayLike | Any = None) -> float:
    """Area under the sparsification error: error rate of those kept by `uncertainty` minus that of the oracle; -1 to 1.

    Holzbock's Algorithm 1, its sign corrected: for q = 0, 2, ... 98 keep u <= percentile(u, 100 - q); the oracle keeps
    by 1 - p[label]; trapezoid with step 0.02. 0 is the oracle, lower is better; a random order scores `random_ause`.
    torch-uncertainty's AUSE is another quantity, and not the same one in every release: errors relative to all errors
    (to 0.12.1) or to the initial error rate (0.13), with an oracle that knows only right and wrong.

    Raises:
        DataError: arrays that do not fit, or that are no probabilities, labels or scores.
    """
    c = checked(probabilities, labels)
    return sparsification_error(*_rankings(c, uncertainty))


def ause_exact(probabilities: ArrayLike | Any, labels: ArrayLike | Any, uncertainty: ArrayLike | Any = None) -> float:
    """The same with every image removed in turn: AURC minus the oracle's AURC; -1 to 1, 0 is the oracle.

    Geifman et al. 2019 call it excess AURC and take an oracle that knows right and wrong; this one orders by
    1 - p[label], as AUSE does.

    Raises:
        DataError: arrays that do not fit, or that are no probabilities, labels or scores.
    """
    ranked, best = _rankings(checked(probabilities, labels), uncertainty)
    return ranked.area() - best.area()


def aurc(probabilities: ArrayLike | Any, labels: ArrayLike | Any, uncertainty: ArrayLike | Any = None) -> float:
    """Area under the risk-coverage curve: mean over k of the error rate among the k most certain images; 0 to 1.

    Geifman and El-Yaniv 2017. torch-uncertainty integrates by trapezoids and leaves ties in the order of the sort.

    Raises:
        DataError: arrays that do not fit, or that are no probabilities, labels or scores.
    """
    return _ranking(checked(probabilities, labels), uncertainty).area()


def accuracy_at(
    probabilities: ArrayLike | Any,
    labels: ArrayLike | Any,
    uncertainty: ArrayLike | Any = None,
    *,
    retained: float = 0.5,
) -> float:
    """Accuracy of the share `retained` of images that are most certain; 0 to 1.

    Raises:
        InputError: `retained` is not above 0 and at most 1.
        DataError: arrays that do not fit, or that are no probabilities, labels or scores.
    """
    ranked = _ranking(checked(probabilities, labels), uncertainty)
    return 1 - risk_of_first(ranked, retained_count(ranked.total, retained))


def risk_at_coverage(
    probabilities: ArrayLike | Any,
    labels: ArrayLike | Any,
    uncertainty: ArrayLike | Any = None,
    *,
    coverage: float = 0.8,
) -> float:
    """Error rate of the fewest most certain images that are at least the share `coverage` of all; 0 to 1.

    Raises:
        InputError: `coverage` is not above 0 and at most 1.
        DataError: arrays that do not fit, or that are no probabilities, labels or scores.
    """
    _share("coverage", coverage)
    ranked = _ranking(checked(probabilities, labels), uncertainty)
    return risk_of_first(ranked, max(1, int(np.ceil(ranked.total * coverage - 1e-9))))


def coverage_at_risk(
    probabilities: ArrayLike | Any,
    labels: ArrayLike | Any,
    uncertainty: ArrayLike | Any = None,
    *,
    risk: float = 0.05,
) -> float:
    """Largest share of most certain images whose error rate is at most `risk`; 0 to 1, NaN where there is none.

    What the images at hand say, without a guarantee for others.

    Raises:
        InputError: `risk` is not from 0 to 1.
        DataError: arrays that do not fit, or that are no probabilities, labels or scores.
    """
    if not 0 <= risk <= 1:
        raise InputError(f"risk={risk}: expected an error rate from 0 to 1")
    ranked = _ranking(checked(probabilities, labels), uncertainty)
    k = np.arange(1, ranked.total + 1)
    enough = np.flatnonzero(ranked.positives_among(k) / k <= risk)
    return float(k[enough[-1]] / ranked.total) if len(enough) else float("nan")


def error_auroc(probabilities: ArrayLike | Any, labels: ArrayLike | Any, uncertainty: ArrayLike | Any = None) -> float:
    """Probability that a wrong image is more uncertain than a right one, ties half; 0 to 1, NaN without either.

    Hendrycks and Gimpel 2017; from ranks. torchmetrics squashes scores outside 0..1 by a sigmoid, which makes ties.

    Raises:
        DataError: arrays that do not fit, or that are no probabilities, labels or scores.
    """
    return _ranking(checked(probabilities, labels), uncertainty).auroc()


def random_ause(probabilities: ArrayLike | Any, labels: ArrayLike | Any) -> float:
    """AUSE that an uncertainty without information has on average: the bar that a useful one stays well below."""
    c = checked(probabilities, labels)
    return float(np.trapezoid(c.wrong.mean() - Ranking(c.oracle, c.wrong).weighed().shares_kept(), dx=STEP))


def sparsification_curves(
    probabilities: ArrayLike | Any, labels: ArrayLike | Any, uncertainty: ArrayLike | Any = None
) -> tuple[Floats, Floats, Floats]:
    """Share removed (50,), error rate of those kept by the uncertainty (50,), and by the oracle (50,)."""
    ranked, best = _rankings(checked(probabilities, labels), uncertainty)
    return 1 - KEPT, ranked.shares_kept(), best.shares_kept()


def spearman(first: ArrayLike | Any, second: ArrayLike | Any) -> float:
    """Rank correlation of two scores (N,), ties at their mean rank; -1 to 1, NaN where either is constant.

    Raises:
        DataError: scores of different lengths, fewer than two, or NaN or infinity among them.
    """
    a = scores(first, "the first score")
    b = scores(second, "the second score", len(a))
    if len(a) < 2:
        raise DataError("1 value: a rank correlation needs two or more")
    if a.min() == a.max() or b.min() == b.max():
        return float("nan")
    return float(spearmanr(a, b).statistic)


def sparsification_error(ranked: Weighed, best: Weighed) -> float:
    """AUSE from the errors in the order of the uncertainty and in that of the oracle."""
    return float(np.trapezoid(ranked.shares_kept() - best.shares_kept(), dx=STEP))


def risk_of_first(ranked: Weighed, count: int) -> float:
    """Expected error rate of the `count` most certain images."""
    return float(ranked.positives_among(np.array([count]))[0] / count)


def retained_count(images: int, retained: float) -> int:
    """How many images the share `retained` is.

    Raises:
        InputError: it is not above 0 and at most 1.
    """
    _share("retained", retained)
    return max(1, round(images * retained))


def _share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise InputError(f"{name}={value}: expected a share above 0 and at most 1")


def _ranking(c: Columns, uncertainty: Any) -> Weighed:
    return Ranking(c.uncertainty(uncertainty), c.wrong).weighed()


def _rankings(c: Columns, uncertainty: Any) -> tuple[Weighed, Weighed]:
    return _ranking(c, uncertainty), Ranking(c.oracle, c.wrong).weighed()
