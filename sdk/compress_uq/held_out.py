"""Figures on images that no figure is reported on: what a choice between runs may look at."""

from __future__ import annotations

import contextlib

import numpy as np
import torch

from compress_uq.calibration import CALIBRATORS
from compress_uq.data import Splits, take_class_balanced
from compress_uq.errors import CalibrationError, DataError
from compress_uq.metrics import classification_figures
from compress_uq.progress import ProgressCallback, silent
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
        return _figures(model.calibrator.logits(torch.from_numpy(logits)), labels), "held out: the decision split"
    if splits.calibration is None:
        return {}, "held out: nothing, since there is neither a decision nor a calibration split"
    logits, labels = logits_of_members(model, splits.calibration, device=device, progress=progress, stage="held out")
    try:
        halves = take_class_balanced(torch.from_numpy(labels), 0.5, seed=0)
    except DataError as error:
        return {}, f"held out: nothing, since the calibration split cannot be halved ({error})"
    calibrated, fitted = _cross_fitted(model.calibrator.name, logits, labels, halves)
    source = "held out: the calibration split, cross-fitted in two halves"
    if fitted < 2:
        source += f", {2 - fitted} of them uncalibrated, since too few of the other half are classified wrong"
    return _figures(torch.from_numpy(calibrated), labels), source


def _cross_fitted(
    calibrator: str, logits: np.ndarray, labels: np.ndarray, halves: tuple[list[int], list[int]]
) -> tuple[np.ndarray, int]:
    """Members' logits (T, N, K), each half calibrated by what the other half says, and how many were."""
    calibrated, count = logits.copy(), 0
    for fitted_on, applied_to in (halves, halves[::-1]):
        with contextlib.suppress(CalibrationError):
            fitted = CALIBRATORS[calibrator].fit(logits[:, fitted_on], labels[fitted_on])
            calibrated[:, applied_to] = fitted.logits(torch.from_numpy(logits[:, applied_to])).numpy()
            count += 1
    return calibrated, count


def _figures(logits: torch.Tensor, labels: np.ndarray) -> dict[str, float | None]:
    prediction = summarise(logits)
    figures = classification_figures(prediction.probabilities.numpy(), labels, prediction.uncertainty.numpy())
    return {name: figure.to_json()["value"] for name, figure in figures.items()}
