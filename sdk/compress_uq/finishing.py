"""From fine-tuned models to one uncertain model: members made, calibrated, scored, decisions fitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from compress_uq.calibration import check_name
from compress_uq.config import AnswerConfig
from compress_uq.data import Splits
from compress_uq.errors import CalibrationError
from compress_uq.progress import ProgressCallback, silent
from compress_uq.stages import ModelsOrResults
from compress_uq.steps import calibrate, fit_uncertainty
from compress_uq.uncertain import UncertainModel

__all__ = ["AnswerOptions", "Finished", "check_answers", "finish", "finish_model"]


class AnswerOptions(TypedDict, total=False):
    """Fields of `AnswerConfig` that a caller may give by name."""

    calibration: str


@dataclass(frozen=True)
class Finished:
    """An uncertain model, and what has to be said of it."""

    model: UncertainModel
    warnings: tuple[str, ...]


def check_answers(answers: AnswerConfig, splits: Splits | None) -> None:
    """Refuse, before any work, what could not be fitted on these splits; None checks the names alone.

    Raises:
        InputError: an unknown name, or a split that is missing.
    """
    check_name(answers.calibration)
    if splits is not None and answers.calibration != "none":
        splits.require("calibration", f"calibration {answers.calibration!r}")


def finish(
    tuned: ModelsOrResults,
    splits: Splits,
    answers: AnswerConfig,
    *,
    name: str,
    device: str = "cpu",
    progress: ProgressCallback = silent,
) -> Finished:
    """The last steps of every run; what cannot be fitted is left out with a warning, so that no training is lost.

    Args:
        tuned: what `finetune` returned, or a list of such for an ensemble.
        splits: needs what the answers ask for.
        name: of the model, for warnings.
    """
    return finish_model(
        fit_uncertainty(tuned, splits, device=device), splits, answers, name=name, device=device, progress=progress
    )


def finish_model(
    model: UncertainModel,
    splits: Splits,
    answers: AnswerConfig,
    *,
    name: str,
    device: str = "cpu",
    progress: ProgressCallback = silent,
) -> Finished:
    """The same from an uncertain model that is not calibrated yet."""
    warnings: list[str] = []
    try:
        model = calibrate(model, splits, method=answers.calibration, device=device, progress=progress)
    except CalibrationError as error:
        warnings.append(f"{name} is not calibrated: {error}")
    return Finished(model, tuple(warnings))
