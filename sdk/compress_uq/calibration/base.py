"""What a calibrator is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
from torch import Tensor, nn

__all__ = ["Calibrator", "Identity"]


class Calibrator(nn.Module, ABC):
    """Maps members' logits to better ones; its state are buffers, so that it saves and exports with the model."""

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def fit(cls, logits: np.ndarray, labels: np.ndarray) -> Calibrator:
        """Fit on members' logits (T, N, K) and labels (N,) of images that nothing else was fitted on."""

    @abstractmethod
    def logits(self, members: Tensor) -> Tensor:
        """Members' logits (T, N, K), calibrated."""


class Identity(Calibrator):
    """No calibration, recorded as such."""

    name = "none"

    @classmethod
    def fit(cls, logits: np.ndarray, labels: np.ndarray) -> Identity:
        """Nothing to fit."""
        return cls()

    def logits(self, members: Tensor) -> Tensor:
        """The logits as they are."""
        return members
