"""Dirichlet calibration."""

from __future__ import annotations

from typing import Self

import numpy as np
import torch
from scipy.special import log_softmax
from torch import Tensor

from compress_uq.calibration.base import Calibrator
from compress_uq.calibration.images import TINY, log_mean
from compress_uq.calibration.optimise import minimum, weakest_that_helps
from compress_uq.calibration.temperature import best_log_temperature
from compress_uq.errors import CalibrationError

__all__ = ["Dirichlet"]

_PENALTIES = (1e5, 1e4, 1e3, 1e2, 1e1, 1e0, 1e-1, 1e-2, 1e-3)
"""Strengths of ODIR that are tried, strongest first."""

_LARGEST = 500_000_000
"""N K^2, multiplications of one step of the fit."""

_DIAGONAL = 0.3
"""Standard deviation of the diagonal about its own mean, under a Gaussian prior."""


class Dirichlet(Calibrator):
    """softmax(W log p + b) of the mean over members (Kull et al. 2019, equation 4).

    Penalised NLL with ODIR (section 3.3): the mean square off the diagonal of W and that of b, times a strength that
    is cross-validated. The diagonal, which ODIR leaves free, is pulled to its own mean: on 300 images of 10 classes it
    overfits otherwise.
    """

    name = "dirichlet"
    needs = ("weight", "bias")
    every_class = True
    weight: Tensor
    """(K, K)"""
    bias: Tensor
    """(K,)"""

    @classmethod
    def _fit(cls, logits: np.ndarray, labels: np.ndarray) -> Self:
        log_p = log_mean(logits)
        if log_p.size * log_p.shape[1] > _LARGEST:
            raise CalibrationError(
                f"calibration 'dirichlet' has {log_p.shape[1] ** 2:,} parameters and {len(log_p):,} images to fit them "
                "on, which takes hours: take calibration 'vector'"
            )
        scale = np.exp(-best_log_temperature(log_p[None], labels))
        classes = log_p.shape[1]
        begin = np.vstack([np.eye(classes) * scale, np.zeros(classes)])

        def fitted(inside: np.ndarray, penalty: float, start: np.ndarray | None) -> np.ndarray:
            return _fitted(log_p[inside], labels[inside], penalty, begin if start is None else start)

        def held_out(found: np.ndarray, outside: np.ndarray) -> float:
            return _nll(log_p[outside], labels[outside], found)[0]

        penalty = weakest_that_helps(_PENALTIES, labels, fitted, held_out)
        found = torch.tensor(_fitted(log_p, labels, penalty, begin), dtype=torch.float32)
        return cls(weight=found[:-1].clone(), bias=found[-1].clone())

    def probabilities(self, mean: Tensor) -> Tensor:
        """softmax(W log p + b) of the mean (N, K)."""
        self.require_fitted()
        return torch.softmax(mean.clamp_min(TINY).log() @ self.weight.T + self.bias, 1)


def _fitted(log_p: np.ndarray, labels: np.ndarray, penalty: float, begin: np.ndarray) -> np.ndarray:
    """W above b, (K + 1, K)."""
    classes = log_p.shape[1]
    off = 1 - np.eye(classes)
    odir = penalty * np.vstack([off / (classes * (classes - 1)), np.full(classes, 1 / classes)])
    pull = 1 / (2 * _DIAGONAL**2 * len(labels))

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        found = flat.reshape(classes + 1, classes)
        nll, slope = _nll(log_p, labels, found)
        diagonal = np.diag(found[:-1])
        apart = diagonal - diagonal.mean()
        slope = slope + 2 * odir * found
        slope[np.arange(classes), np.arange(classes)] += 2 * pull * apart
        return nll + float((odir * found**2).sum() + pull * apart @ apart), slope.ravel()

    return minimum(objective, begin.ravel()).reshape(classes + 1, classes)


def _nll(log_p: np.ndarray, labels: np.ndarray, found: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean NLL, and its gradient (K + 1, K)."""
    rows = np.arange(len(labels))
    log_q = log_softmax(log_p @ found[:-1].T + found[-1], axis=1)
    gradient = np.exp(log_q)
    gradient[rows, labels] -= 1
    gradient /= len(labels)
    return float(-log_q[rows, labels].mean()), np.vstack([gradient.T @ log_p, gradient.sum(0)])
