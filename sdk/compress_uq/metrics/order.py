"""Images in order: the one sort behind AUSE, AURC, AUROC, AUPR and FPR95, and behind sums over bins and classes.

A weight is how often an image counts. Every figure of weighted images is that of the images repeated so many times,
which is what a bootstrap resample is: the sort is done once, and a resample costs a few cumulative sums. Images that
tie form a group; within it every image carries the group's mean, which is the mean over the orders of the ties.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from compress_uq.metrics.arrays import Bools, Floats, Ints

__all__ = ["KEPT", "STEP", "Groups", "Ranking", "Weighed"]

STEP = 0.02
KEPT: Floats = (100 - np.arange(0, 100, 2)) / 100
"""Shares that Holzbock's Algorithm 1 keeps, in turn."""


class Ranking:
    """Images by ascending score (N,), some of them positive: wrong, or out-of-distribution."""

    def __init__(self, scores: Floats, positive: Bools) -> None:
        self.order = np.argsort(scores)
        self.ordered = scores[self.order]
        self.places: Ints = np.flatnonzero(positive[self.order])
        """Where the positives stand in the order (P,)."""
        starts = np.flatnonzero(np.concatenate([[True], self.ordered[1:] != self.ordered[:-1]]))
        # Only groups that hold a positive matter (G,): their span in the order, and their first positive.
        group, self.first = np.unique(np.searchsorted(starts, self.places, side="right") - 1, return_index=True)
        self.start = starts[group]
        self.stop = np.append(starts, len(scores))[group + 1]

    def weighed(self, weights: Ints | None = None) -> Weighed:
        """The order with each image (in the order that the scores were given) counted `weights` (N,) times, or once."""
        counts = np.ones(len(self.order), np.int64) if weights is None else weights.take(self.order)
        return Weighed(self, counts)


class Weighed:
    """A ranking with weights: counts up to each place, and from them the figures."""

    def __init__(self, ranking: Ranking, counts: Ints) -> None:
        self.ranking = ranking
        self.images = _running(counts)
        """Images before each place of the order (N + 1,)."""
        self.positives = _running(counts.take(ranking.places))
        """Positives before each positive (P + 1,)."""
        self.total, self.positive = int(self.images[-1]), int(self.positives[-1])
        # Of each group (G,): images and positives before it and in it.
        self.before = self.images.take(ranking.start)
        self.after = self.images.take(ranking.stop)
        self.count = self.after - self.before
        self.positives_before = self.positives.take(ranking.first)
        self.group_positives = np.append(self.positives_before[1:], self.positive) - self.positives_before

    def area(self) -> float:
        """Mean over k = 1..N of the share of positives among the first k: AURC where positives are errors."""
        harmonic, summed = _harmonic(self.total)
        # The j-th image counts in the shares of k = j..N, with 1 / k each; a group's images all with their mean.
        lost = (summed.take(self.after) - summed.take(self.before)) / np.maximum(self.count, 1)
        return float((self.group_positives * (harmonic - lost)).sum() / self.total)

    def positives_among(self, k: Ints) -> Floats:
        """Expected number of positives among the first k images, for every k from 1 to N that is asked for."""
        if self.positive == 0:
            return np.zeros(len(k))
        group = np.searchsorted(self.before, k) - 1
        inside = np.minimum(k - self.before[group], self.count[group])
        part = self.group_positives[group] * inside / np.maximum(self.count[group], 1)
        return np.where(group < 0, 0.0, self.positives_before[group] + part)

    def shares_kept(self) -> Floats:
        """Share of positives among scores <= percentile(100 - q), q = 0, 2, ... 98 (50,): one sparsification curve."""
        ordered = self.ranking.ordered
        place = (self.total - 1) * KEPT
        below = np.floor(place).astype(np.int64)
        ends = np.stack([below, np.minimum(below + 1, self.total - 1)])
        a, b = ordered[np.searchsorted(self.images, ends, side="right") - 1]
        # numpy's percentiles: a threshold between two scores keeps the lower one and what ties with it.
        kept = np.searchsorted(ordered, a + (b - a) * (place - below), side="right")
        shares: Floats = self.positives[np.searchsorted(self.ranking.places, kept)] / self.images[kept]
        return shares

    def auroc(self) -> float:
        """Probability that a positive scores higher than a negative, ties half; NaN where either is absent."""
        negative = self.total - self.positive
        if self.positive == 0 or negative == 0:
            return float("nan")
        below = 2 * (self.before - self.positives_before) + self.count - self.group_positives
        return float((self.group_positives * below).sum()) / (2 * self.positive * negative)

    def average_precision(self) -> float:
        """Sum over thresholds of the recall gained times the precision; NaN without positives."""
        if self.positive == 0:
            return float("nan")
        flagged = np.maximum(self.total - self.before, 1)
        precision = (self.positive - self.positives_before) / flagged
        return float((self.group_positives * precision).sum() / self.positive)

    def false_positive_rate(self, recall: float) -> float:
        """Share of negatives at or above the highest threshold that at least `recall` of the positives reach."""
        negative = self.total - self.positive
        if self.positive == 0 or negative == 0:
            return float("nan")
        missed = int(np.floor((1 - recall) * self.positive + 1e-9))
        group = np.searchsorted(self.positives_before + self.group_positives, missed, side="right")
        flagged = self.total - self.before[group] - (self.positive - self.positives_before[group])
        return float(flagged / negative)


class Groups:
    """Which of `count` groups each of some images `rows` (n,) is in, `group` (n,); sums over each for any weights.

    The images are sorted by group once; then a sum takes half the time of `np.bincount`.
    """

    def __init__(self, rows: Ints, group: Ints, count: int) -> None:
        order = np.argsort(group, kind="stable")
        self.rows, self.count = rows[order], count
        self.present, self.starts = np.unique(group[order], return_index=True)

    def sums(self, weights: Floats) -> Floats:
        """Sum of the weights (N,) over each group (count,)."""
        sums = np.zeros(self.count)
        if len(self.rows):
            sums[self.present] = np.add.reduceat(weights.take(self.rows), self.starts)
        return sums


def _running(counts: Ints) -> Ints:
    """Sums before each place, and the whole: (n,) to (n + 1,)."""
    sums = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=sums[1:])
    return sums


@lru_cache(maxsize=2)
def _harmonic(n: int) -> tuple[float, Floats]:
    """H(n), and sum_{j = 1}^{m} H(j - 1) for m = 0..n (n + 1,), where H(m) = 1 + 1/2 + ... + 1/m."""
    numbers = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, n + 1))])
    summed = np.concatenate([[0.0], np.cumsum(numbers[:-1])])
    summed.flags.writeable = False
    return float(numbers[-1]), summed
