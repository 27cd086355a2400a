"""Figures on images that no figure is reported on: what a choice between runs may look at."""

from __future__ import annotations

import contextlib

import numpy as np
import torch

from compress_uq.calibration import CALIBRATORS, Calibrator
from compress_uq.data import Splits, take_class_balanced
from compress_uq.errors import CalibrationError, DataError
from compress_uq.metrics import classification_metrics
from compress_uq.progress import ProgressCallback, silent
from compress_uq.scores import Score
from compress_uq.steps import logits_of_members
from compress_uq.uncertain import UncertainModel, summarise

__all__ = ["held_out_figures"]


def held_out_figures(
    model: UncertainModel, splits: Splits, *, device: str = "cpu", progress: ProgressCallback = silent
) -> tuple[dict[str, float | None], str]:
    """The metrics on the `decision` split, or cross-fitted on `calibration`, and which of them it was.

    Cross-fitted: either class-balanced half is measured with a calibrator that was fitted on the other, so that no
    image has a say in its own calibration, and none is lost to the calibrator of the model itself. A half that nothing
    fits stays uncalibrated, as a whole model would, and the words say so.
    """
    if splits.decision is not None:
        logits, labels = logits_of_members(model, splits.decision, device=device, progress=progress, stage="held out")
        return _figures(*_answers(logits, model.calibrator, model.score), labels), "held out: the decision split"
    if splits.calibration is None:
        return {}, "held out: nothing, since there is neither a decision nor a calibration split"
    logits, labels = logits_of_members(model, splits.calibration, device=device, progress=progress, stage="held out")
    try:
        halves = take_class_balanced(torch.from_numpy(labels), 0.5, seed=0)
    except DataError as error:
        return {}, f"held out: nothing, since the calibration split cannot be halved ({error})"
    probabilities, uncertainty, fitted = _cross_fitted(model, logits, labels, halves)
    source = "held out: the calibration split, cross-fitted in two halves"
    if fitted < 2:
        source += f", {2 - fitted} of them uncalibrated, since too few of the other half are classified wrong"
    return _figures(probabilities, uncertainty, labels), source


def _cross_fitted(
    model: UncertainModel, logits: np.ndarray, labels: np.ndarray, halves: tuple[list[int], list[int]]
) -> tuple[np.ndarray, np.ndarray, int]:
    """Probabilities (N, K) and uncertainty (N,), each half calibrated by what the other says; how many halves were."""
    probabilities = np.empty(logits.shape[1:], np.float32)
    uncertainty = np.empty(logits.shape[1], np.float32)
    count = 0
    for fitted_on, applied_to in (halves, halves[::-1]):
        calibrator = None
        with contextlib.suppress(CalibrationError):
            calibrator = CALIBRATORS[model.calibrator.name].fit(logits[:, fitted_on], labels[fitted_on])
            count += 1
        probabilities[applied_to], uncertainty[applied_to] = _answers(logits[:, applied_to], calibrator, model.score)
    return probabilities, uncertainty, count


def _answers(logits: np.ndarray, calibrator: Calibrator | None, score: Score) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and uncertainty of members' logits (T, N, K); a score of features gives way to 1 - confidence."""
    prediction = summarise(torch.from_numpy(logits), calibrator=calibrator, score=None if score.of_features else score)
    return prediction.probabilities.numpy(), prediction.uncertainty.numpy()


def _figures(probabilities: np.ndarray, uncertainty: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    values = classification_metrics(probabilities, labels, uncertainty)
    return {name: None if np.isnan(value) else value for name, value in values.items()}
