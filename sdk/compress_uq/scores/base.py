"""What a score is: one number per image, higher where the model should be believed less."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from compress_uq.errors import InputError, UncertaintyError, UnknownNameError
from compress_uq.fitted import Fitted, Plain

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
    logits: np.ndarray
    """(N, K) float32, mean over members, not calibrated."""
    weight: np.ndarray | None
    """(G, K, D) float32 of each network's classifier; None where it is not linear in the features."""
    bias: np.ndarray | None
    """(G, K) float32."""

    def __post_init__(self) -> None:
        if not np.isfinite(self.features).all():
            raise UncertaintyError("the features of training images hold NaN or infinite values: no score fits them")


class Score(Fitted, ABC):
    """A function of a model's answers that exports with it."""

    of_features: ClassVar[bool] = False
    """True where it looks at features, and so has to be fitted."""
    of_members: ClassVar[bool] = False
    """True where it compares members, and is 0 for a single one."""
    defaults: ClassVar[Mapping[str, Plain]] = {}
    """The options there are, each with its default."""

    def __init__(self, options: Mapping[str, Plain] | None = None, **tensors: Tensor) -> None:
        given = dict(options or {})
        for name, value in given.items():
            if name not in self.defaults:
                raise UnknownNameError(f"option of {self.name}", name, self.defaults)
            if isinstance(value, str) or value < 0:
                raise InputError(f"{self.name}: {name}={value}: expected a number of 0 or more")
        super().__init__({**self.defaults, **given}, **tensors)

    @classmethod
    def fit(cls, training: TrainingFeatures | None, options: Mapping[str, Plain] | None = None) -> Score:
        """Ready to use; only scores of features look at training images.

        Raises:
            UnknownNameError: an option that the score does not have.
            UncertaintyError: training images that it cannot be fitted on.
        """
        return cls(options)

    @abstractmethod
    def forward(self, answers: Answers) -> Tensor:
        """(N,) float32, higher is less certain or more out-of-distribution."""
