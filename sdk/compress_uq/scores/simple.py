"""Scores of the probabilities alone."""

from __future__ import annotations

from torch import Tensor

from compress_uq.scores.base import Answers, Score

__all__ = ["Confidence", "Entropy"]


class Confidence(Score):
    """1 - max p (Hendrycks and Gimpel 2017); 0 to 1 - 1/K."""

    name = "confidence"

    def forward(self, answers: Answers) -> Tensor:
        """(N,) float32."""
        return 1 - answers.probabilities.amax(1)


class Entropy(Score):
    """Shannon entropy of the mean, nats; 0 to log K."""

    name = "entropy"

    def forward(self, answers: Answers) -> Tensor:
        """(N,) float32."""
        return answers.entropy * 1.0  # an output of its own in an exported graph
