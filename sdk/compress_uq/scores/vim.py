"""Virtual-logit matching: what the features hold that the training features do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress_uq.errors import UncertaintyError
from compress_uq.fitted import Plain
from compress_uq.scores.base import Answers, Score, TrainingFeatures
from compress_uq.scores.simple import energy

__all__ = ["ViM"]


class ViM(Score):
    """alpha * norm of the residual - log sum exp of the mean logits (Wang et al. 2022).

    The residual is what is left of the features, seen from -W^+ b, outside the principal space of the training
    features. Its dimension is the authors': 1000 of 2048 features or more, 512 of 768 or more, else half of them. Alpha
    is the mean of the largest logit over the mean norm. Of several networks the mean residual is taken.
    """

    name = "vim"
    of_features = True
    needs = ("origin", "residual", "alpha")
    defaults: ClassVar[Mapping[str, Plain]] = {"dimension": 0}
    origin: Tensor
    """(G, 1, D)"""
    residual: Tensor
    """(G, D, D - d)"""
    alpha: Tensor
    """(G, 1)"""

    @classmethod
    def fit(cls, training: TrainingFeatures | None, options: Mapping[str, Plain] | None = None) -> ViM:
        """Find the principal space, in float64; `dimension` 0 is the authors' choice.

        Raises:
            UncertaintyError: no training images, a classifier that is not linear in its features, or features that
                leave no residual.
        """
        given = int(cls(options).options["dimension"])
        if training is None:
            raise UncertaintyError("'vim' looks at training images: pass splits with a train split")
        if training.weight is None or training.bias is None:
            raise UncertaintyError("vim: the classifier is not linear in what enters it; use another score")
        width = training.features.shape[2]
        dimension = given or _dimension(width)
        if not 0 < dimension < width:
            raise UncertaintyError(f"vim: dimension={dimension}: expected 1 to {width - 1}, of {width} features")
        top = float(training.logits.astype(np.float64).max(1).mean())
        found = [
            _residual_space(features.astype(np.float64), weight, bias, dimension, top)
            for features, weight, bias in zip(training.features, training.weight, training.bias, strict=True)
        ]
        stacked = (torch.from_numpy(np.stack(part).astype(np.float32)) for part in zip(*found, strict=True))
        return cls({"dimension": dimension}, **dict(zip(cls.needs, stacked, strict=True)))

    def forward(self, answers: Answers) -> Tensor:
        """(N,) float32."""
        self.require_fitted()
        assert answers.features is not None
        left = ((answers.features - self.origin) @ self.residual).square().sum(2).sqrt()
        return (self.alpha * left).mean(0) + energy(answers.logits.mean(0))


def _dimension(width: int) -> int:
    if width >= 2048:
        return 1000
    return 512 if width >= 768 else width // 2


def _residual_space(
    features: NDArray[np.float64], weight: NDArray[np.float32], bias: NDArray[np.float32], dimension: int, top: float
) -> tuple[NDArray[np.float64], ...]:
    """Origin (1, D), basis of the residual space (D, D - d) and alpha (1,) of one network."""
    origin = -(np.linalg.pinv(weight.astype(np.float64)) @ bias.astype(np.float64))[None]
    shifted = features - origin
    _, axes = np.linalg.eigh(shifted.T @ shifted / len(shifted))
    basis = axes[:, : features.shape[1] - dimension]
    norm = float(np.linalg.norm(shifted @ basis, axis=1).mean())
    if norm <= 1e-9 * float(np.linalg.norm(shifted, axis=1).mean()):
        raise UncertaintyError(
            f"vim: {dimension} directions hold all of the training features, nothing is left over: take fewer"
        )
    return origin, basis, np.array([top / norm])
