"""How well an uncertainty ranks the errors: sparsification, risk and coverage, AUROC.

Where images tie, the value is the mean over their orders. `uncertainty` defaults to 1 - max p.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from compress_uq.errors import InputError
from compress_uq.metrics.arrays import Floats, checked, floats

__all__ = ["accuracy_at", "aurc", "ause", "ause_exact", "error_auroc", "random_ause", "sparsification_curves"]

_STEP = 0.02
_REMOVED = np.arange(0, 100, 2)


def ause(probabilities: ArrayLike | Any, labels: ArrayLike | Any, uncertainty: ArrayLike | Any = None) -> float:
    """Area under the sparsification error: error rate of those kept by `uncertainty` minus that of the oracle.

    Holzbock's Algorithm 1, its sign corrected: for q = 0, 2, ... 98 keep u <= percentile(u, 100 - q); the oracle keeps
    by 1 - p[label]; trapezoid with step 0.02. Lower is better; a random order scores `random_ause`. torch-uncertainty's
    AUSE is another quantity (errors relative to the initial error, a 0/1 oracle).
    """
    p, y = checked(probabilities, labels)
    wrong = p.argmax(1) != y
    return ause_of(_uncertainty(p, uncertainty), wrong, 1 - p[np.arange(len(y)), y])


def ause_exact(probabilities: ArrayLike | Any, labels: ArrayLike | Any, uncertainty: ArrayLike | Any = None) -> float:
    """The same with every image removed in turn: AURC minus the oracle's AURC."""
    p, y = checked(probabilities, labels)
    wrong = p.argmax(1) != y
    return aurc_of(_uncertainty(p, uncertainty), wrong) - aurc_of(1 - p[np.arange(len(y)), y], wrong)


def aurc(probabilities: ArrayLike | Any, labels: ArrayLike | Any, uncertainty: ArrayLike | Any = None) -> float:
    """Area under the risk-coverage curve: mean over k of the error rate among the k most certain images."""
    p, y = checked(probabilities, labels)
    return aurc_of(_uncertainty(p, uncertainty), p.argmax(1) != y)


def accuracy_at(
    probabilities: ArrayLike | Any,
    labels: ArrayLike | Any,
    uncertainty: ArrayLike | Any = None,
    *,
    retained: float = 0.5,
) -> float:
    """Accuracy of the share `retained` of images that are most certain.

    Raises:
        InputError: `retained` is not above 0 and at most 1.
    """
    p, y = checked(probabilities, labels)
    return accuracy_at_of(_uncertainty(p, uncertainty), p.argmax(1) != y, retained)


def error_auroc(probabilities: ArrayLike | Any, labels: ArrayLike | Any, uncertainty: ArrayLike | Any = None) -> float:
    """Probability that a wrong image is more uncertain than a right one, ties half; NaN without either."""
    p, y = checked(probabilities, labels)
    return auroc(_uncertainty(p, uncertainty), p.argmax(1) != y)


def random_ause(probabilities: ArrayLike | Any, labels: ArrayLike | Any) -> float:
    """AUSE that an uncertainty without information has on average: the bar that a useful one stays well below."""
    p, y = checked(probabilities, labels)
    wrong = p.argmax(1) != y
    _, oracle = _curves(np.zeros(len(y)), wrong, 1 - p[np.arange(len(y)), y])
    return float(np.trapezoid(wrong.mean() - oracle, dx=_STEP))


def sparsification_curves(
    probabilities: ArrayLike | Any, labels: ArrayLike | Any, uncertainty: ArrayLike | Any = None
) -> tuple[Floats, Floats, Floats]:
    """Share removed (50,), error rate of those kept by the uncertainty (50,), and by the oracle (50,)."""
    p, y = checked(probabilities, labels)
    kept, oracle = _curves(_uncertainty(p, uncertainty), p.argmax(1) != y, 1 - p[np.arange(len(y)), y])
    return _REMOVED / 100, kept, oracle


def ause_of(uncertainty: Floats, wrong: Any, oracle: Floats) -> float:
    """AUSE from uncertainties, errors and the oracle's order, each (N,)."""
    kept, best = _curves(uncertainty, wrong, oracle)
    return float(np.trapezoid(kept - best, dx=_STEP))


def aurc_of(uncertainty: Floats, wrong: Any) -> float:
    """AURC from uncertainties and errors, each (N,)."""
    return float((_expected_errors(uncertainty, wrong) / np.arange(1, len(wrong) + 1)).mean())


def accuracy_at_of(uncertainty: Floats, wrong: Any, retained: float) -> float:
    """Accuracy of the most certain share, from uncertainties and errors (N,)."""
    if not 0 < retained <= 1:
        raise InputError(f"retained={retained}: expected a share above 0 and at most 1")
    count = max(1, round(len(wrong) * retained))
    return float(1 - _expected_errors(uncertainty, wrong)[count - 1] / count)


def auroc(scores: Floats, positive: Any) -> float:
    """Rank-based AUROC (N,), ties half; NaN where one class is empty. No score is squashed on the way."""
    count = int(np.sum(positive))
    if count in (0, len(scores)):
        return float("nan")
    ranks = rankdata(scores)[np.asarray(positive, dtype=bool)].sum()
    return float((ranks - count * (count + 1) / 2) / (count * (len(scores) - count)))


def _uncertainty(p: Floats, given: Any) -> Floats:
    values = 1 - p.max(1) if given is None else floats(given, "uncertainty").reshape(-1)
    if len(values) != len(p):
        raise InputError(f"uncertainty has {len(values)} values: expected one for each of {len(p)} images")
    return values


def _curves(uncertainty: Floats, wrong: Any, oracle: Floats) -> tuple[Floats, Floats]:
    return _kept_errors(uncertainty, wrong), _kept_errors(oracle, wrong)


def _kept_errors(order_by: Floats, wrong: Any) -> Floats:
    """Error rate among u <= percentile(u, 100 - q) for every q, by one sort."""
    order = np.argsort(order_by, kind="stable")
    ordered = order_by[order]
    kept = np.searchsorted(ordered, np.percentile(ordered, 100 - _REMOVED), side="right")
    errors = np.concatenate([[0.0], np.cumsum(np.asarray(wrong, dtype=np.float64)[order])])
    return errors[kept] / kept


def _expected_errors(uncertainty: Floats, wrong: Any) -> Floats:
    """Expected number of errors among the k most certain images, k = 1..N, over the orders of ties."""
    _, group, count = np.unique(uncertainty, return_inverse=True, return_counts=True)
    errors = np.bincount(group, weights=np.asarray(wrong, dtype=np.float64))
    # Within a group of ties every image carries the group's mean error.
    return np.cumsum(np.repeat(errors / count, count))
