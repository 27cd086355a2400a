"""Temperature scaling."""

from __future__ import annotations

import math
from typing import Self

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp
from torch import Tensor

from compress_uq.calibration.base import Calibrator
from compress_uq.errors import CalibrationError

__all__ = ["Temperature", "best_log_temperature"]

_BOUND = math.log(1000.0)
"""How far the search goes, up and down, from the temperature that gives logits a spread of 1."""


class Temperature(Calibrator):
    """One temperature for all members, positive by construction (Guo et al. 2017, section 4.2).

    It minimises the negative log-likelihood of the mean over members of softmax(logits / t).
    """

    name = "temperature"
    needs = ("log_temperature",)
    log_temperature: Tensor

    @property
    def temperature(self) -> float:
        """t; above 1 softens."""
        return math.exp(float(self.log_temperature))

    @classmethod
    def _fit(cls, logits: np.ndarray, labels: np.ndarray) -> Self:
        return cls(log_temperature=torch.tensor(best_log_temperature(logits, labels), dtype=torch.float32))

    def logits(self, members: Tensor) -> Tensor:
        """Members' logits (T, N, K) divided by t."""
        self.require_fitted()
        return members * torch.exp(-self.log_temperature)


def best_log_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """log t of the temperature that fits members' logits (T, N, K) and labels (N,) best.

    Raises:
        CalibrationError: the likelihood has no optimum, as when every image is classified right, or when answers and
            labels have nothing to do with each other.
    """
    members = logits.astype(np.float64)
    rows = np.arange(len(labels))
    spread = float(members.std(axis=2).mean()) or 1.0
    centred = (members - members.max(2, keepdims=True)) / spread

    def nll(relative: float) -> float:
        log_p = log_softmax(centred / math.exp(relative), axis=2)[:, rows, labels]
        return float(-(logsumexp(log_p, axis=0) - math.log(len(members))).mean())

    found = minimize_scalar(nll, bounds=(-_BOUND, _BOUND), method="bounded", options={"xatol": 1e-6})
    sharp, flat = nll(-_BOUND), nll(_BOUND)
    if min(sharp, flat) <= nll(found.x) + 1e-7:
        right = int((np.exp(log_softmax(members, axis=2)).mean(0).argmax(1) == labels).sum())
        remedy = "give more calibration images" if sharp < flat else "look at the model and the order of its classes"
        raise CalibrationError(
            f"no temperature fits: {right} of {len(labels)} calibration images are classified right, and the "
            f"likelihood has no optimum; {remedy}, or take calibration 'none'"
        )
    return float(found.x) + math.log(spread)
