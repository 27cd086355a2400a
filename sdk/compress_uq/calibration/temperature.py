"""Temperature scaling."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp
from torch import Tensor

from compress_uq.calibration.base import Calibrator
from compress_uq.errors import CalibrationError

__all__ = ["Temperature"]

_BOUND = math.log(50.0)


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
    def fit(cls, logits: np.ndarray, labels: np.ndarray) -> Temperature:
        """Fit t on members' logits (T, N, K) and labels (N,).

        Raises:
            CalibrationError: the likelihood has no optimum, as when every image is classified right.
        """
        members = logits.astype(np.float64)
        rows = np.arange(len(labels))
        likelihood = members - members.max(2, keepdims=True)

        def nll(log_temperature: float) -> float:
            log_p = log_softmax(likelihood / math.exp(log_temperature), axis=2)[:, rows, labels]
            return float(-(logsumexp(log_p, axis=0) - math.log(len(members))).mean())

        found = minimize_scalar(nll, bounds=(-_BOUND, _BOUND), method="bounded", options={"xatol": 1e-6})
        if min(nll(-_BOUND), nll(_BOUND)) <= nll(found.x) + 1e-7:
            right = int((np.exp(log_softmax(members, axis=2)).mean(0).argmax(1) == labels).sum())
            raise CalibrationError(
                f"no temperature fits: {right} of {len(labels)} calibration images are classified right, and the "
                "likelihood has no optimum; give more calibration images, or calibration 'none'"
            )
        return cls(log_temperature=torch.tensor(found.x, dtype=torch.float32))

    def logits(self, members: Tensor) -> Tensor:
        """Members' logits (T, N, K) divided by t."""
        self.require_fitted()
        return members * torch.exp(-self.log_temperature)
