"""Parts of one data set that share no image, each with the classes in the same proportions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Subset

from compress_uq.data.splits import Splits, labels_of
from compress_uq.errors import DataError

__all__ = ["SMALLEST_PART", "balanced_sample", "divide", "set_aside"]

SMALLEST_PART = 200
"""Images that a decision rule is worth having to itself; below it the images are shared by cross-fitting."""


def divide(labels: ArrayLike, parts: int, *, seed: int = 0) -> tuple[list[int], ...]:
    """The indices of labels (N,) in `parts` class-balanced parts: sorted, no index twice, none left out.

    Sizes differ by one at most, and so do the images of a class.

    Raises:
        DataError: fewer images than parts.
    """
    truth = np.asarray(labels)
    if len(truth) < parts:
        raise DataError(f"{len(truth)} images cannot be divided into {parts} parts")
    # Dealt like cards, class after class, so that a class that does not come out even is evened out by the next.
    dealt = np.random.default_rng(seed).permutation(len(truth))
    dealt = dealt[np.argsort(truth[dealt], kind="stable")]
    return tuple(sorted(dealt[part::parts].tolist()) for part in range(parts))


def balanced_sample(labels: ArrayLike, size: int, *, seed: int = 0) -> NDArray[np.int64]:
    """Sorted indices of at most `size` images, of every class equally many as far as there are enough."""
    truth = np.asarray(labels)
    order = np.random.default_rng(seed).permutation(len(truth))
    by_class = order[np.argsort(truth[order], kind="stable")]
    _, counts = np.unique(truth, return_counts=True)
    turn = np.concatenate([np.arange(count) for count in counts])
    return np.sort(by_class[np.argsort(turn, kind="stable")[:size]])


def set_aside(splits: Splits, *, rules: int) -> Splits:
    """Splits whose `decision` part was taken from `calibration`, before anything was fitted on it.

    The calibrator and each of the rules get an equal share. Nothing changes where there is a decision split, no
    calibration split, no rule, or a share would hold fewer than `SMALLEST_PART` images.
    """
    calibration = splits.calibration
    if rules == 0 or splits.decision is not None or calibration is None:
        return splits
    labels = labels_of(calibration)
    if len(labels) // (1 + rules) < SMALLEST_PART:
        return splits
    first, *others = divide(labels, 1 + rules)
    taken = sorted(index for part in others for index in part)
    info = replace(
        splits.info,
        calibration=f"{splits.info.calibration}; {len(taken)} of them are the decision split, {len(first)} are left",
    )
    return replace(splits, calibration=Subset(calibration, first), decision=Subset(calibration, taken), info=info)
