"""Decision rules, each fitted on images that nothing else was fitted on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from compress_uq.config import Guarantees
from compress_uq.cost import on_device
from compress_uq.data import Splits, check_labels, divide
from compress_uq.decisions import (
    ACCEPTANCE_RULES,
    SET_RULES,
    AcceptanceRule,
    SetRule,
    check_coverage,
    check_risk,
    conformal_rank,
    smallest_risk,
)
from compress_uq.errors import CalibrationError, DecisionError
from compress_uq.fitted import Plain
from compress_uq.predict import collect_predictions
from compress_uq.progress import ProgressCallback, silent
from compress_uq.steps import cross_calibrators, members_of_images
from compress_uq.training import resolve_device
from compress_uq.types import Prediction
from compress_uq.uncertain import UncertainModel, summarise

__all__ = ["check_decisions", "decide", "fit_rules", "promised"]

_CROSSED = (
    "the calibration split, cross-fitted: each half's probabilities come from a calibrator fitted on the other half, "
    "and the model's own calibrator saw both, so that the guarantee is approximate"
)


def decide(
    model: UncertainModel,
    splits: Splits,
    *,
    risk: float | None = None,
    coverage: float | None = None,
    delta: float = 0.05,
    sets: str = "lac",
    options: Mapping[str, Plain] | None = None,
    device: str = "cpu",
    progress: ProgressCallback = silent,
) -> UncertainModel:
    """A copy of a model that accepts or refuses (`risk`), or names a set of classes (`coverage`), or both.

    The rules look at the `decision` split, each at a class-balanced half of it where both are asked for. Without one
    they share `calibration` in the same way: as it is where the model is not calibrated, else cross-fitted, which
    makes the guarantee approximate, as does a method that chose its members on these images; `set_aside` makes a
    decision split of a large enough calibration split before the calibrator is fitted. Which it was stands in the
    model's `record`.

    Args:
        model: calibrated and scored as it is to be used: a threshold holds for no other probabilities.
        splits: needs `decision` or `calibration`.
        risk: largest share of wrong answers among the accepted ones, with probability 1 - `delta` (SGR).
        coverage: how often the truth is in the set at least.
        sets: how they are made, by name.
        options: of the set rule, such as `{"penalty": 0.1, "free": 3}` for `raps`.

    Raises:
        DecisionError: nothing was asked for, or something that these images cannot certify; names what they can.
        DataError: there are no held-out images.
    """
    asked = Guarantees(risk=risk, coverage=coverage, delta=delta, sets=sets, options=options)
    decided, errors = fit_rules(model, splits, asked, device=device, progress=progress)
    if errors:
        raise errors[0]
    return decided


def fit_rules(
    model: UncertainModel,
    splits: Splits,
    guarantees: Guarantees,
    *,
    device: str = "cpu",
    progress: ProgressCallback = silent,
) -> tuple[UncertainModel, list[DecisionError]]:
    """`decide`, with what could not be certified beside the model instead of raised, so that one rule may stand alone.

    Raises:
        DecisionError: nothing was asked for, or what no images could certify.
        DataError: there are no held-out images.
    """
    asked = guarantees.asked
    if not asked:
        raise DecisionError("neither risk nor coverage was given: expected one of them, such as risk=0.05")
    check_decisions(guarantees, splits=None)
    held_out = _held_out(model, splits, device=device, progress=progress)
    fitted: dict[str, Any] = {}
    record = dict(model.record)
    errors: list[DecisionError] = []
    for name, part in zip(asked, held_out.parts(len(asked)), strict=True):
        try:
            fitted[name] = _FITS[name](part, guarantees)
        except DecisionError as error:
            errors.append(error)
        else:
            record[name] = {"rule": fitted[name].name, **fitted[name].options, "from": part.source, "exact": part.exact}
    return model.but(**fitted, record=record), errors


def promised(model: UncertainModel) -> Guarantees:
    """What a model's rules promise, so that others can be asked for the same."""
    asked: dict[str, Any] = {}
    if model.acceptance is not None:
        asked |= {name: model.acceptance.options[name] for name in ("risk", "delta")}
    if model.sets is not None:
        options = {name: value for name, value in model.sets.options.items() if name not in ("coverage", "images")}
        asked |= {"coverage": model.sets.options["coverage"], "sets": model.sets.name, "options": options or None}
    return Guarantees(**asked)


def check_decisions(guarantees: Guarantees, *, splits: Splits | None) -> None:
    """Refuse, before any work, what could not be certified even if every answer were right; None checks values alone.

    Raises:
        DecisionError: a value that cannot be, or too few images for it.
        UnknownNameError: no such set rule.
        DataError: there are no held-out images.
    """
    rule = SET_RULES[guarantees.sets]
    risk, coverage, delta = guarantees.risk, guarantees.coverage, guarantees.delta
    if risk is not None:
        check_risk(risk, delta)
    if coverage is not None:
        check_coverage(coverage)
    if splits is None or not guarantees.asked:
        return
    dataset = splits.decision if splits.decision is not None else splits.require("calibration", "a decision rule")
    images = len(dataset) // len(guarantees.asked)  # type: ignore[arg-type]
    if coverage is not None:
        conformal_rank(rule.threshold_images(images, guarantees.options), coverage)
    if risk is not None and smallest_risk(images, delta) > risk:
        raise DecisionError(
            f"risk {risk:g} cannot be certified with {images} images at delta {delta:g}: even without a wrong answer "
            f"the smallest is {smallest_risk(images, delta):.4f}; allow more risk or give more images"
        )


@dataclass(frozen=True)
class _HeldOut:
    """Answers to images, and how they may be shared out."""

    prediction: Prediction
    labels: np.ndarray
    halves: tuple[list[int], ...]
    """What two rules get; of a cross-fitted split the halves that calibrated each other."""
    source: str
    exact: bool

    def parts(self, rules: int) -> list[_HeldOut]:
        """One for each of one or two rules, without a shared image."""
        if rules == 1:
            return [replace(self, source=f"{self.source} ({len(self.labels)} images)")]
        return [
            replace(
                self,
                prediction=Prediction(*(None if field is None else field[half] for field in self.prediction)),
                labels=self.labels[half],
                source=f"{self.source} (half {number} of 2, {len(half)} images)",
            )
            for number, half in enumerate(self.halves, start=1)
        ]


def _fit_acceptance(part: _HeldOut, guarantees: Guarantees) -> AcceptanceRule:
    assert guarantees.risk is not None
    wrong = part.prediction.label != part.labels
    return ACCEPTANCE_RULES["sgr"].fit(part.prediction.uncertainty, wrong, risk=guarantees.risk, delta=guarantees.delta)


def _fit_sets(part: _HeldOut, guarantees: Guarantees) -> SetRule:
    assert guarantees.coverage is not None
    return SET_RULES[guarantees.sets].fit(
        part.prediction.probabilities, part.labels, coverage=guarantees.coverage, options=guarantees.options
    )


_FITS: Mapping[str, Callable[[_HeldOut, Guarantees], AcceptanceRule | SetRule]] = {
    "acceptance": _fit_acceptance,
    "sets": _fit_sets,
}


def _held_out(model: UncertainModel, splits: Splits, *, device: str, progress: ProgressCallback) -> _HeldOut:
    """The decision split as the model answers it, or the calibration split, cross-fitted where a calibrator saw it."""
    bare = model.but(acceptance=None, sets=None)
    target = resolve_device(device)
    calibrated = model.calibrator.name != "none"
    dataset = splits.decision
    if dataset is None:
        dataset = splits.require("calibration", "a decision rule")
        if calibrated:
            return _cross_fitted(bare, splits, device=device, progress=progress)
    exact = splits.decision is not None or not model.method.looks_at_calibration
    source = "the decision split" if splits.decision is not None else "the calibration split, which no calibrator saw"
    if not exact:
        source += f", but on which {model.method.name} chose its members, so that the guarantee is approximate"
    with on_device(bare, target):
        prediction, labels = collect_predictions(bare, dataset, device=target, progress=progress, stage="deciding")
    check_labels(torch.from_numpy(labels), prediction.probabilities.shape[1])
    return _HeldOut(prediction, labels, divide(labels, 2), source, exact)


def _cross_fitted(model: UncertainModel, splits: Splits, *, device: str, progress: ProgressCallback) -> _HeldOut:
    """Answers to the calibration split, each half calibrated by what the other says.

    Raises:
        DecisionError: nothing fits a half.
    """
    dataset = splits.require("calibration", "a decision rule")
    logits, features, labels = members_of_images(
        model, dataset, features=model.score.of_features, device=device, progress=progress, stage="deciding"
    )
    try:
        parts = cross_calibrators(model.calibrator.name, logits, labels)
    except CalibrationError as error:
        raise DecisionError(
            f"a decision rule needs images that the calibrator did not see, and {len(labels)} calibration images "
            f"are too few to share ({error}); give a decision split, or calibration 'none'"
        ) from error
    halves = tuple(own for own, _ in parts)
    pieces: list[Prediction] = []
    for applied_to, calibrator in parts:
        with torch.inference_mode():
            pieces.append(
                summarise(
                    torch.from_numpy(logits[:, applied_to]),
                    None if features is None else torch.from_numpy(features[:, applied_to]),
                    calibrator=calibrator,
                    score=model.score,
                )
            )
    place = np.argsort(np.concatenate(halves))
    joined = (np.concatenate([f.numpy() for f in pair])[place] for pair in zip(*(p[:8] for p in pieces), strict=True))
    return _HeldOut(Prediction(*joined), labels, halves, _CROSSED, False)
