"""What a calibrator is."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from torch import Tensor

from compress_uq.errors import CalibrationError
from compress_uq.fitted import Fitted

__all__ = ["Calibrator", "Identity"]


class Calibrator(Fitted, ABC):
    """Better probabilities from members' logits.

    It may act twice: on each member as it enters the mean (`logits`), and on the mean (`probabilities`), which comes
    after mutual information is taken.
    """

    error = CalibrationError

    @classmethod
    @abstractmethod
    def fit(cls, logits: np.ndarray, labels: np.ndarray) -> Calibrator:
        """Fit on members' logits (T, N, K) and labels (N,) of images that nothing else was fitted on."""

    def logits(self, members: Tensor) -> Tensor:
        """Members' logits (T, N, K) as they enter the mean."""
        return members

    def probabilities(self, mean: Tensor) -> Tensor:
        """The mean over members (N, K), calibrated; rows sum to one."""
        return mean


class Identity(Calibrator):
    """No calibration, recorded as such."""

    name = "none"

    @classmethod
    def fit(cls, logits: np.ndarray, labels: np.ndarray) -> Identity:
        """Nothing to fit."""
        return cls()
