"""What a score is: one number per image, higher where the model should be believed less."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from compress_uq.fitted import Fitted

__all__ = ["Answers", "Score", "TrainingFeatures"]


class Answers(NamedTuple):
    """All that a score may look at, of N images, T members and K classes."""

    logits: Tensor
    """(T, N, K) float32, not calibrated."""
    probabilities: Tensor
    """(N, K) float32, calibrated mean."""
    entropy: Tensor
    """(N,) of `probabilities`, nats."""
    mutual_information: Tensor
    """(N,) nats, of the members as they enter the mean."""
    variance: Tensor
    """(N,) over members, of the predicted class's probability."""
    features: Tensor | None
    """(G, N, D) float32: what enters the classifier of each of G networks, mean over the members that share it; None
    unless the score asks for them."""


@dataclass(frozen=True)
class TrainingFeatures:
    """What a feature score is fitted on: training images as the networks see them."""

    features: np.ndarray
    """(G, N, D) float32."""
    labels: np.ndarray
    """(N,) int64."""
    weight: np.ndarray
    """(G, K, D) float32 of each network's classifier."""
    bias: np.ndarray
    """(G, K) float32."""


class Score(Fitted, ABC):
    """A function of a model's answers that exports with it."""

    of_features: ClassVar[bool] = False
    """True where it looks at features, and so has to be fitted."""

    @classmethod
    def fit(cls, training: TrainingFeatures | None) -> Score:
        """Ready to use; only scores of features look at training images."""
        return cls()

    @abstractmethod
    def forward(self, answers: Answers) -> Tensor:
        """(N,) float32, higher is less certain or more out-of-distribution."""
