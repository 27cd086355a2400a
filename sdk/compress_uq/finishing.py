"""From fine-tuned models to one uncertain model: members made, calibrated, scored, decisions fitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from compress_uq.calibration import check_name
from compress_uq.choosing import check_scores, choose_scores
from compress_uq.config import AnswerConfig
from compress_uq.data import Splits, set_aside
from compress_uq.deciding import check_decisions, fit_rules
from compress_uq.errors import CalibrationError, DecisionError, UncertaintyError
from compress_uq.progress import ProgressCallback, silent
from compress_uq.stages import ModelsOrResults
from compress_uq.steps import calibrate, fit_uncertainty
from compress_uq.uncertain import UncertainModel

__all__ = ["AnswerOptions", "Finished", "check_answers", "finish", "finish_model"]


class AnswerOptions(TypedDict, total=False):
    """Fields of `AnswerConfig` that a caller may give by name."""

    calibration: str
    score: str
    ood_score: str
    risk: float | None
    coverage: float | None
    risk_delta: float
    sets: str


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
    check_scores(answers.score, answers.ood_score, splits)
    after = None if splits is None else set_aside(splits, rules=answers.rules)
    check_decisions(answers.guarantees, splits=after)


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
        splits: needs what the answers ask for; a decision split is set aside of calibration where rules need one.
        name: of the model, for warnings.
    """
    splits = set_aside(splits, rules=answers.rules)
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
    splits = set_aside(splits, rules=answers.rules)
    try:
        model = calibrate(model, splits, method=answers.calibration, device=device, progress=progress)
    except CalibrationError as error:
        warnings.append(f"{name} is not calibrated: {error}")
    try:
        model = choose_scores(
            model, splits, score=answers.score, ood_score=answers.ood_score, device=device, progress=progress
        )
    except UncertaintyError as error:
        warnings.append(f"{name} keeps the scores {model.score.name} and {model.ood_score.name}: {error}")
    if answers.rules:
        try:
            model, errors = fit_rules(model, splits, answers.guarantees, device=device, progress=progress)
        except DecisionError as error:
            errors = [error]
        warnings += [f"{name} goes without a decision rule that was asked for: {error}" for error in errors]
    return Finished(model, tuple(warnings))
