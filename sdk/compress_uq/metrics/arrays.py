"""Arrays or tensors in, checked float64 arrays out."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from compress_uq.errors import DataError

__all__ = ["Floats", "Ints", "checked", "floats"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def floats(values: ArrayLike | Any, name: str) -> Floats:
    """A float64 array.

    Raises:
        DataError: empty, or NaN among the values.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise DataError(f"{name} is empty")
    if np.isnan(array).any():
        raise DataError(f"{name} holds NaN")
    return array


def checked(probabilities: ArrayLike | Any, labels: ArrayLike | Any) -> tuple[Floats, Ints]:
    """Probabilities (N, K) float64 and labels (N,) int64.

    Raises:
        DataError: shapes that do not fit, or labels out of range.
    """
    p = floats(probabilities, "probabilities")
    y = np.asarray(labels).reshape(-1).astype(np.int64)
    if p.ndim != 2 or len(p) != len(y):
        raise DataError(f"probabilities {p.shape} and labels {y.shape}: expected (N, K) and (N,)")
    if y.min() < 0 or y.max() >= p.shape[1]:
        raise DataError(f"labels from {y.min()} to {y.max()}: expected 0 to {p.shape[1] - 1}")
    return p, y
