"""How often prediction sets hold the label, and how large they are."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from compress_uq.errors import DataError
from compress_uq.metrics.arrays import Bools, as_array, class_numbers

__all__ = ["mean_set_size", "set_coverage"]


def set_coverage(sets: ArrayLike | Any, labels: ArrayLike | Any) -> float:
    """Share of images whose prediction set, a row of (N, K) booleans, holds the label; 0 to 1.

    Raises:
        DataError: sets that are not boolean (N, K), or labels that do not fit them.
    """
    members, y = _sets(sets), class_numbers(labels)
    if len(members) != len(y):
        raise DataError(f"sets {members.shape} and labels {y.shape}: expected (N, K) and (N,)")
    if y.min() < 0 or y.max() >= members.shape[1]:
        raise DataError(f"labels from {y.min()} to {y.max()}: expected 0 to {members.shape[1] - 1}")
    return float(members[np.arange(len(y)), y].mean())


def mean_set_size(sets: ArrayLike | Any) -> float:
    """Mean number of classes in the prediction sets (N, K) of booleans; 0 to K. An empty set counts as 0.

    Raises:
        DataError: sets that are not boolean (N, K).
    """
    return float(_sets(sets).sum(1).mean())


def _sets(sets: ArrayLike | Any) -> Bools:
    array = as_array(sets)
    if array.ndim != 2 or array.dtype != np.bool_ or array.size == 0:
        raise DataError(f"sets {array.shape} of {array.dtype}: expected booleans (N, K), none of them empty")
    return array
