"""Scores of the answers alone: probabilities, members, logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from compress_uq.fitted import Plain
from compress_uq.scores.base import Answers, Score

__all__ = ["Confidence", "Energy", "Entropy", "GeneralisedEntropy", "MutualInformation", "Variance"]

_SMALLEST = 1.2e-38
"""Below it a float32 has fewer digits, and some runtimes take it for 0."""


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


class MutualInformation(Score):
    """What the members disagree on, nats (Smith and Gal 2018, equation 3); 0 to log K."""

    name = "mutual-information"
    of_members = True

    def forward(self, answers: Answers) -> Tensor:
        """(N,) float32."""
        return answers.mutual_information * 1.0


class Variance(Score):
    """Variance over members of the predicted class's probability; 0 to 1/4."""

    name = "variance"
    of_members = True

    def forward(self, answers: Answers) -> Tensor:
        """(N,) float32."""
        return answers.variance * 1.0


class Energy(Score):
    """-log sum exp of the members' mean logits, not calibrated (Liu et al. 2020, equation 4, temperature 1)."""

    name = "energy"

    def forward(self, answers: Answers) -> Tensor:
        """(N,) float32."""
        return energy(answers.logits.mean(0))


def energy(logits: Tensor) -> Tensor:
    """-log sum exp of logits (N, K), of operators that every runtime has."""
    largest = logits.amax(1, keepdim=True)
    return -((logits - largest).exp().sum(1).log() + largest[:, 0])


class GeneralisedEntropy(Score):
    """Sum of (p (1 - p))^gamma over the `top` largest probabilities (Liu et al. 2023, GEN)."""

    name = "gen"
    defaults: ClassVar[Mapping[str, Plain]] = {"gamma": 0.1, "top": 100}

    def forward(self, answers: Answers) -> Tensor:
        """(N,) float32."""
        classes = answers.probabilities.shape[1]
        ordered = torch.topk(answers.probabilities, classes, dim=1).values
        # 1 - p of the largest would round to 0 long before the others add up to 0.
        others = torch.cat([ordered[:, 1:].sum(1, keepdim=True), 1 - ordered[:, 1:]], 1)
        terms = (ordered * others).clamp_min(_SMALLEST).pow(float(self.options["gamma"]))
        return terms[:, : min(int(self.options["top"]), classes)].sum(1)
