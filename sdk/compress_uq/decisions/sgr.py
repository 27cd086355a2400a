"""Selective prediction with a bound on the risk of what is accepted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import beta
from torch import Tensor

from compress_uq.decisions.base import AcceptanceRule, images_and_values
from compress_uq.errors import DecisionError

__all__ = ["SGR", "binomial_bound", "check_risk", "smallest_risk"]


class SGR(AcceptanceRule):
    """Selection with guaranteed risk (Geifman and El-Yaniv 2017, algorithm 2), tried on all images first.

    With probability at least 1 - delta over the images it is fitted on, the share of wrong answers among the accepted
    ones is at most `risk`. Answers of images that tie with the threshold are all accepted.
    """

    name = "sgr"

    @classmethod
    def fit(cls, uncertainty: np.ndarray, wrong: np.ndarray, *, risk: float, delta: float = 0.05) -> SGR:
        """All images if that is certified, else the largest certified coverage that a bisection over thresholds meets.

        Each of the thresholds it may visit, 1 + ceil(log2 N) of them, gets an equal part of delta. The paper never
        accepts all; few images without a mistake certify the least risk that way, and bisection would pass it by.

        Raises:
            DecisionError: risk or delta not between 0 and 1, NaN, or a risk that these images cannot certify; names
                the smallest that they can, and its coverage.
        """
        check_risk(risk, delta)
        count = images_and_values(uncertainty, wrong, "uncertainties")
        curve, part = _Curve.of(uncertainty, wrong), delta / _tests(count)
        found, least = _bisect(curve, risk, part)
        if found is None:
            possible = math.ceil(least * 1e4) / 1e4
            best, _ = _bisect(curve, possible, part)
            assert best is not None
            raise DecisionError(
                f"risk {risk:g} cannot be certified with {count} images at delta {delta:g}: the smallest is "
                f"{possible:.4f}, at a coverage of {best.accepted / count:.3f}; allow more risk, give more images, "
                "or a better model"
            )
        options = {
            "risk": risk, "delta": delta, "images": count, "bound": found.bound, "coverage": found.accepted / count,
            "empirical_risk": found.wrong / found.accepted,
        }  # fmt: skip
        return cls(options, threshold=torch.tensor(found.threshold, dtype=torch.float32))

    def forward(self, uncertainty: Tensor) -> Tensor:
        """(N,) bool: the uncertainty is at most the threshold."""
        self.require_fitted()
        return uncertainty <= self.threshold


def binomial_bound(wrong: int, accepted: int, delta: float) -> float:
    """The largest rate under which at most `wrong` errors of `accepted` have a probability of at least delta."""
    return 1.0 if wrong >= accepted else float(beta.ppf(1 - delta, wrong + 1, accepted - wrong))


def smallest_risk(images: int, delta: float) -> float:
    """What that many images could certify at best: all of them accepted, and none wrong."""
    return binomial_bound(0, images, delta / _tests(images))


def check_risk(risk: float, delta: float) -> None:
    """Refuse what no images could certify.

    Raises:
        DecisionError: risk or delta not above 0 and below 1.
    """
    for name, value in (("risk", risk), ("delta", delta)):
        if not 0 < value < 1:
            raise DecisionError(f"{name} {value:g}: expected a share above 0 and below 1")


def _tests(images: int) -> int:
    """Thresholds that may be visited: all N images, and a bisection over 0 to N."""
    return 1 + math.ceil(math.log2(images))


@dataclass(frozen=True)
class _Curve:
    """Images in order of uncertainty."""

    ordered: NDArray[np.float32]
    """(N,) ascending."""
    errors: NDArray[np.int64]
    """(N,) how many of the first 1, 2, ... are wrong."""

    @classmethod
    def of(cls, uncertainty: np.ndarray, wrong: np.ndarray) -> _Curve:
        order = np.argsort(uncertainty, kind="stable")
        return cls(np.asarray(uncertainty, np.float32)[order], np.cumsum(np.asarray(wrong)[order].astype(np.int64)))

    def at(self, wanted: int, delta: float) -> _Point:
        """The threshold that accepts that many, and those that tie with the last."""
        threshold = self.ordered[wanted - 1]
        accepted = int(np.searchsorted(self.ordered, threshold, side="right"))
        wrong = int(self.errors[accepted - 1])
        return _Point(float(threshold), accepted, wrong, binomial_bound(wrong, accepted, delta))


@dataclass(frozen=True)
class _Point:
    threshold: float
    accepted: int
    wrong: int
    bound: float


def _bisect(curve: _Curve, risk: float, delta: float) -> tuple[_Point | None, float]:
    """The certified point with the largest coverage that was visited, and the smallest bound.

    Where none is certified, every step went to fewer images. A search for that smallest bound takes the same steps up
    to it, and certifies it there.
    """
    whole = curve.at(len(curve.ordered), delta)
    if whole.bound <= risk:
        return whole, whole.bound
    best, least = None, whole.bound
    certified, refused = 0, len(curve.ordered)
    while refused - certified > 1:
        middle = (certified + refused) // 2
        point = curve.at(middle, delta)
        least = min(least, point.bound)
        if point.bound <= risk:
            certified, best = middle, point
        else:
            refused = middle
    return best, least
