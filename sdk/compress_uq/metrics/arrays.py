"""Arrays or tensors in, checked arrays out: what every metric takes of each image."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from compress_uq.errors import DataError

__all__ = ["Bools", "Columns", "Floats", "Ints", "as_array", "check_rows", "checked", "class_numbers", "scores"]

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SUM_TOLERANCE = 1e-3
# A block of rows stays in the processor's cache while several reductions read it.
_BLOCK = 2**18


@dataclass(frozen=True)
class Columns:
    """What the metrics need of each image, in float64, from one walk over the probabilities."""

    labels: Ints
    predicted: Ints
    confidence: Floats
    """Largest probability (N,)."""
    true: Floats
    """Probability of the label (N,)."""
    squares: Floats
    """Sum of squared probabilities (N,)."""
    classes: int

    @cached_property
    def wrong(self) -> Bools:
        """Whether the most probable class is not the label (N,)."""
        wrong: Bools = self.predicted != self.labels
        return wrong

    @property
    def oracle(self) -> Floats:
        """1 - p[label] (N,): the uncertainty that knows the truth."""
        return 1 - self.true

    @property
    def nll(self) -> Floats:
        """-log p[label] (N,), a probability below 1e-12 counting as 1e-12."""
        return -np.log(np.maximum(self.true, 1e-12))

    @property
    def brier(self) -> Floats:
        """sum_k (p_k - [k = label])^2 (N,)."""
        return self.squares - 2 * self.true + 1

    def uncertainty(self, given: Any) -> Floats:
        """1 - max p, or the uncertainty that was given.

        Raises:
            DataError: not one finite value for each image.
        """
        return 1 - self.confidence if given is None else scores(given, "uncertainty", len(self.labels))


def checked(probabilities: ArrayLike | Any, labels: ArrayLike | Any) -> Columns:
    """The columns of probabilities (N, K) and labels (N,); float32 stays float32 until a row is reduced.

    Raises:
        DataError: shapes that do not fit, labels out of range, or rows that are no probabilities.
    """
    p = _real(probabilities, "probabilities")
    y = class_numbers(labels)
    if p.ndim != 2 or len(p) != len(y):
        raise DataError(f"probabilities {p.shape} and labels {y.shape}: expected (N, K) and (N,)")
    if y.min() < 0 or y.max() >= p.shape[1]:
        raise DataError(f"labels from {y.min()} to {y.max()}: expected 0 to {p.shape[1] - 1}")
    predicted, squares = np.empty(len(p), np.int64), np.empty(len(p))
    step = max(1, _BLOCK // p.shape[1])
    for start in range(0, len(p), step):
        block = p[start : start + step]
        check_rows(block, start)
        predicted[start : start + step] = block.argmax(1)
        squares[start : start + step] = np.vecdot(block, block)
    rows = np.arange(len(p))
    return Columns(
        y, predicted, p[rows, predicted].astype(np.float64), p[rows, y].astype(np.float64), squares, p.shape[1]
    )


def check_rows(block: NDArray[Any], first: int = 0, name: str = "probabilities") -> None:
    """Refuse rows (n, K) that are no probabilities; `first` is the number of the first row in the caller's array.

    Raises:
        DataError: a value that is not finite or below zero, or a row whose sum is more than 0.001 away from one.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        sums = block.sum(1)
    if not np.isfinite(sums).all():
        raise DataError(f"{name} hold NaN or infinite values, first in row {first + np.isfinite(sums).argmin()}")
    off = np.abs(sums - 1) > SUM_TOLERANCE
    if off.any():
        row = int(off.argmax())
        raise DataError(
            f"{name}: row {first + row} sums to {sums[row]:.6g}, expected 1 within {SUM_TOLERANCE} (logits need a "
            "softmax first, bfloat16 is too coarse for one)"
        )
    if block.min() < 0:
        row = int((block < 0).any(1).argmax())
        raise DataError(f"{name}: row {first + row} holds {block[row].min():.6g}, expected 0 to 1")


def class_numbers(labels: ArrayLike | Any) -> Ints:
    """Labels (N,) int64.

    Raises:
        DataError: none, or not whole numbers.
    """
    y = as_array(labels).reshape(-1)
    if y.size == 0:
        raise DataError("labels are empty: expected one for each image")
    if y.dtype.kind not in "iub":
        raise DataError(f"labels are {y.dtype}: expected class numbers, which are whole")
    return y.astype(np.int64)


def scores(values: ArrayLike | Any, name: str, count: int | None = None) -> Floats:
    """Scores (N,) float64; `count` is how many there must be.

    Raises:
        DataError: none, another number than `count`, or NaN or infinity among them.
    """
    array = _real(values, name).astype(np.float64).reshape(-1)
    if count is not None and len(array) != count:
        raise DataError(f"{name} has {len(array)} values: expected one for each of {count} images")
    if not np.isfinite(array).all():
        raise DataError(f"{name} holds NaN or infinite values, first at place {np.isfinite(array).argmin()}")
    return array


def as_array(values: ArrayLike | Any) -> NDArray[Any]:
    """A numpy array of an array, a list or a tensor on any device."""
    if not isinstance(values, torch.Tensor):
        return np.asarray(values)
    tensor = values.detach().cpu()
    array: NDArray[Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def _real(values: ArrayLike | Any, name: str) -> NDArray[Any]:
    """float32 and float64 as they come, anything else as float64."""
    array = as_array(values)
    if array.size == 0:
        raise DataError(f"{name} is empty: expected at least one image")
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float64)
