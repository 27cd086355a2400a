"""Distance to the nearest class, relative to the distance to all training images."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress_uq.errors import UncertaintyError
from compress_uq.fitted import Plain
from compress_uq.scores.base import Answers, Score, TrainingFeatures

__all__ = ["RelativeMahalanobis"]

_RIDGE = 1e-6
"""Share of the mean variance added to every direction, for features that never vary in training."""


class RelativeMahalanobis(Score):
    """min over classes of MD_k - MD_0 (Ren et al. 2021): Gaussians of the classes with one covariance,
    less a Gaussian of all training images.

    The total covariance is the one within classes plus the one between them. In directions that the between-class
    part does not reach MD_k and MD_0 are equal, so that the difference lives in at most K - 1 discriminant directions
    and is computed there, where float32 is enough; the two distances themselves would cancel. Of several networks the
    mean is taken.
    """

    name = "relative-mahalanobis"
    of_features = True
    needs = ("origin", "directions", "shrink", "centres")
    origin: Tensor
    """(G, 1, D)"""
    directions: Tensor
    """(G, D, R)"""
    shrink: Tensor
    """(G, 1, R)"""
    centres: Tensor
    """(G, R, K)"""

    @classmethod
    def fit(cls, training: TrainingFeatures | None, options: Mapping[str, Plain] | None = None) -> RelativeMahalanobis:
        """Means and covariances, in float64.

        Raises:
            UncertaintyError: no training images, or a single class among them.
        """
        if training is None:
            raise UncertaintyError("'relative-mahalanobis' looks at training images: pass splits with a train split")
        if len(np.unique(training.labels)) < 2:
            raise UncertaintyError("relative-mahalanobis: the training images are all of one class, expected several")
        found = [_discriminant(features.astype(np.float64), training.labels) for features in training.features]
        stacked = (torch.from_numpy(np.stack(part).astype(np.float32)) for part in zip(*found, strict=True))
        return cls(options, **dict(zip(cls.needs, stacked, strict=True)))

    def forward(self, answers: Answers) -> Tensor:
        """(N,) float32; negative near a class."""
        self.require_fitted()
        assert answers.features is not None
        at = (answers.features - self.origin) @ self.directions
        of_classes = self.centres.square().sum(1, keepdim=True) - 2 * at @ self.centres
        return ((at.square() * self.shrink).sum(2) + of_classes.amin(2)).mean(0)


def _discriminant(features: NDArray[np.float64], labels: NDArray[np.int64]) -> tuple[NDArray[np.float64], ...]:
    """Origin (1, D), directions (D, R), shrinkage (1, R) and class centres (R, K) of one network's features (N, D)."""
    classes, index = np.unique(labels, return_inverse=True)
    origin = features.mean(0, keepdims=True)
    centred = features - origin
    counts = np.bincount(index)
    means = np.stack([centred[index == k].mean(0) for k in range(len(classes))])
    within = centred - means[index]
    covariance = within.T @ within / len(features)
    variances, axes = np.linalg.eigh(covariance)
    ridge = max(_RIDGE * float(np.trace(centred.T @ centred)) / centred.size, np.finfo(np.float64).tiny)
    whitening = axes / np.sqrt(np.maximum(variances, 0) + ridge)
    weighted = np.sqrt(counts / len(features))[:, None] * (means @ whitening)
    _, lengths, rotation = np.linalg.svd(weighted, full_matrices=False)
    rank = min(len(classes) - 1, features.shape[1])
    between, directions = lengths[:rank] ** 2, whitening @ rotation[:rank].T
    return origin, directions, (between / (1 + between))[None], (means @ directions).T
