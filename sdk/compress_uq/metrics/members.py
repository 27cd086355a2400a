"""What members say apart and together: entropies of each image, in nats."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from compress_uq.errors import DataError
from compress_uq.metrics.arrays import Floats, as_array, check_rows

__all__ = ["entropy", "mutual_information", "vote_entropy"]


def entropy(probabilities: ArrayLike | Any) -> Floats:
    """Shannon entropy -sum_k p_k log p_k (N,) of probabilities (N, K); 0 to log K, with 0 log 0 = 0.

    Raises:
        DataError: not (N, K), or rows that are no probabilities.
    """
    return _entropy(_probabilities(probabilities, 2, "(N, K)"))


def mutual_information(members: ArrayLike | Any) -> Floats:
    """Entropy of the mean minus mean entropy (N,) of the members' probabilities (M, N, K); 0 to log min(M, K).

    Smith and Gal 2018, equation 3; BALD's score. torch-uncertainty takes (N, M, K).

    Raises:
        DataError: not (M, N, K), or rows that are no probabilities.
    """
    p = _probabilities(members, 3, "(M, N, K)")
    information: Floats = _entropy(p.mean(0)) - _entropy(p).mean(0)
    return np.maximum(information, 0.0)


def vote_entropy(members: ArrayLike | Any) -> Floats:
    """Entropy (N,) of how the members' votes, the argmax of each of (M, N, K), fall on the classes; 0 to log min(M, K).

    Engelson and Dagan 1996, not divided by log M. Probabilities and logits vote alike; a member whose largest values
    tie votes for the first of them.

    Raises:
        DataError: not (M, N, K), empty, or NaN among the values.
    """
    values = _members(members, 3, "(M, N, K)")
    if np.isnan(values).any():
        raise DataError("members hold NaN: expected probabilities or logits")
    votes = values.argmax(2)
    count, images, classes = values.shape
    counted = np.bincount((votes + classes * np.arange(images)).ravel(), minlength=images * classes)
    return _entropy(counted.reshape(images, classes) / count)


def _entropy(p: NDArray[Any]) -> Floats:
    logs: Floats = np.log(p, out=np.zeros_like(p), where=p > 0)
    # Adding zero turns the minus zero of a certain row into zero.
    entropies: Floats = -(p * logs).sum(-1) + 0.0
    return entropies


def _probabilities(values: Any, dimensions: int, shape: str) -> Floats:
    p = _members(values, dimensions, shape).astype(np.float64)
    check_rows(p.reshape(-1, p.shape[-1]))
    return p


def _members(values: Any, dimensions: int, shape: str) -> NDArray[Any]:
    array = as_array(values)
    if array.ndim != dimensions or array.size == 0:
        raise DataError(f"probabilities {array.shape}: expected {shape}, none of them empty")
    return array
