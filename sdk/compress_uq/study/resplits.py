"""How a calibrator does by luck of the draw: fitted on one random part of the images, measured on the rest, again."""

from __future__ import annotations

import numpy as np
import torch

from compress_uq.calibration import CALIBRATORS
from compress_uq.data import take_class_balanced
from compress_uq.errors import CalibrationError
from compress_uq.metrics import ece
from compress_uq.uncertain import summarise

__all__ = ["resplit_ece"]


def resplit_ece(
    logits: np.ndarray, labels: np.ndarray, calibrator: str, *, share: float = 0.2, repeats: int = 20
) -> tuple[float, float]:
    """Mean and standard deviation (n - 1) of the ECE over random choices of the calibration images.

    Args:
        logits: members' logits (T, N, K) float32 of images that no training saw.
        labels: (N,).
        calibrator: its name.
        share: of the images, class-balanced, that the calibrator is fitted on; ECE is of the others.
        repeats: how many choices, from seeds 0, 1, ….

    Raises:
        CalibrationError: nothing fits in one of the choices.
    """
    found = []
    for seed in range(repeats):
        fitted_on, rest = take_class_balanced(torch.from_numpy(labels), share, seed=seed)
        try:
            fitted = CALIBRATORS[calibrator].fit(logits[:, fitted_on], labels[fitted_on])
        except CalibrationError as error:
            raise CalibrationError(f"choice {seed} of {repeats}: {error}") from error
        prediction = summarise(torch.from_numpy(logits[:, rest]), calibrator=fitted)
        found.append(ece(prediction.probabilities.numpy(), labels[rest]))
    return float(np.mean(found)), float(np.std(found, ddof=1))
