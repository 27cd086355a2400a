"""What a calibrator is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Self

import numpy as np
from torch import Tensor

from compress_uq.calibration.images import refuse_missing_classes, refuse_unusable
from compress_uq.errors import CalibrationError
from compress_uq.fitted import Fitted

__all__ = ["Calibrator", "Identity"]


class Calibrator(Fitted, ABC):
    """Better probabilities from members' logits.

    It may act twice: on each member as it enters the mean (`logits`), and on the mean (`probabilities`), which comes
    after mutual information is taken.
    """

    error = CalibrationError
    every_class: ClassVar[bool] = False
    """True where each class has parameters of its own, which take images of it to fit."""
    choice: Mapping[str, object] | None = None
    """How calibration `auto` came to it, as plain values; None where it was asked for by name."""

    @classmethod
    def refuse_unavailable(cls) -> None:
        """Refuse, before any work, what could not be fitted here for want of a library.

        Raises:
            MissingDependencyError: says how to install it.
        """

    @classmethod
    def fit(cls, logits: np.ndarray, labels: np.ndarray) -> Self:
        """Fit on members' logits (T, N, K) and labels (N,) int of images that nothing else was fitted on.

        Raises:
            CalibrationError: NaN or infinite logits, fewer images than classes, a class without images where each is
                needed, or a likelihood without an optimum.
        """
        refuse_unusable(cls.name, logits, labels)
        if cls.every_class:
            refuse_missing_classes(cls.name, labels, logits.shape[2])
        return cls._fit(logits, labels)

    @classmethod
    @abstractmethod
    def _fit(cls, logits: np.ndarray, labels: np.ndarray) -> Self:
        """`fit`, on logits and labels that were looked at."""

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
    def fit(cls, logits: np.ndarray, labels: np.ndarray) -> Self:
        """Nothing to fit, and so nothing to refuse."""
        return cls._fit(logits, labels)

    @classmethod
    def _fit(cls, logits: np.ndarray, labels: np.ndarray) -> Self:
        return cls()
