"""Rules that turn probabilities into decisions, with a guarantee that was bought with held-out images."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from torch import Tensor

from compress_uq.fitted import Fitted

__all__ = ["AcceptanceRule", "SetRule"]


class AcceptanceRule(Fitted, ABC):
    """Which answers to believe."""

    @abstractmethod
    def forward(self, uncertainty: Tensor) -> Tensor:
        """(N,) bool from the model's `uncertainty` (N,)."""


class SetRule(Fitted, ABC):
    """Which classes to name, so that the truth is among them as often as was asked for."""

    @classmethod
    @abstractmethod
    def fit(cls, probabilities: np.ndarray, labels: np.ndarray, *, coverage: float) -> SetRule:
        """Fit on calibrated probabilities (N, K) and labels (N,) that nothing else was fitted on."""

    @abstractmethod
    def forward(self, probabilities: Tensor) -> Tensor:
        """(N, K) bool from calibrated probabilities (N, K)."""
