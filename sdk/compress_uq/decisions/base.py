"""Rules that turn probabilities into decisions, with a guarantee that was bought with held-out images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from compress_uq.errors import DecisionError
from compress_uq.fitted import Fitted, Plain

__all__ = ["AcceptanceRule", "Rule", "SetRule", "images_and_values"]


class Rule(Fitted, ABC):
    """A decision by one threshold; what was guaranteed, and on how many images, stands among its options."""

    needs = ("threshold",)
    error = DecisionError
    threshold: Tensor
    """float32 scalar."""


class AcceptanceRule(Rule):
    """Which answers to believe."""

    @classmethod
    @abstractmethod
    def fit(cls, uncertainty: np.ndarray, wrong: np.ndarray, *, risk: float, delta: float) -> AcceptanceRule:
        """Fit on uncertainties (N,) and errors (N,) bool of images that nothing else was fitted on."""

    @abstractmethod
    def forward(self, uncertainty: Tensor) -> Tensor:
        """(N,) bool from the model's `uncertainty` (N,)."""


class SetRule(Rule):
    """Which classes to name, so that the truth is among them as often as was asked for."""

    @classmethod
    def threshold_images(cls, images: int, options: Mapping[str, Plain] | None = None) -> int:
        """How many of so many images choose the threshold, at most."""
        return images

    @classmethod
    @abstractmethod
    def fit(
        cls,
        probabilities: np.ndarray,
        labels: np.ndarray,
        *,
        coverage: float,
        options: Mapping[str, Plain] | None = None,
    ) -> SetRule:
        """Fit on calibrated probabilities (N, K) and labels (N,) that nothing else was fitted on."""

    @abstractmethod
    def forward(self, probabilities: Tensor) -> Tensor:
        """(N, K) bool from calibrated probabilities (N, K)."""


def images_and_values(values: np.ndarray, beside: np.ndarray, what: str) -> int:
    """N, of values (N, ...) and what stands beside them (N,).

    Raises:
        DecisionError: no image, other lengths, or values that are not finite.
    """
    if len(values) == 0 or len(values) != len(beside):
        raise DecisionError(f"{len(values)} {what} and {len(beside)} labels: expected as many of both, and some")
    if not np.isfinite(values).all():
        raise DecisionError(f"the {what} hold NaN or infinite values: no threshold fits them")
    return len(values)
