"""A report card's column measured again: which figures hold, within what rounding does to them on these images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress_uq.metrics import classification_metrics, ood_aupr, ood_auroc, ood_fpr95, per_class_accuracy
from compress_uq.report.decisions import decision_figures
from compress_uq.report.evaluation import Evaluation
from compress_uq.types import Prediction

__all__ = ["Check", "Deciders", "compare_column"]

Deciders = Mapping[str, Callable[[np.ndarray], np.ndarray]]
"""Decision rules by the output that each gives: `accepted` from uncertainty, `prediction_set` from probabilities."""

ROUNDING = {"fp32": 1e-5, "fp16": 2e-3, "int8": 2e-2}
"""Relative difference of a probability between two machines that run one file, by the file's precision.

Float32 sums in another order differ by some 1e-6. A number of float16 is exact to 5e-4, and an activation of int8 that
is rounded the other way moves by a whole step.
"""

_DRAWS, _MARGIN, _LEAST = 16, 4, 1e-7
_OF_CLASS = "accuracy of "
_SCORES = {"auroc": ood_auroc, "aupr": ood_aupr, "fpr95": ood_fpr95}


@dataclass(frozen=True)
class Check:
    """What was looked at."""

    found: str
    held: bool | None
    """None where there was nothing to compare it with; `found` says why."""

    def __str__(self) -> str:
        return self.found


def compare_column(
    recorded: Mapping[str, Any], measured: Evaluation, precision: str, rules: Deciders | None = None
) -> dict[str, Check]:
    """Every figure of a column beside what was measured now.

    A figure may differ by four times what rounding of the answers does to it at most, in 16 draws: counts of right
    answers are exactly equal but for images that are tied within rounding, and figures of ranks and bins but for images
    that are tied, or on the border of a bin.

    Args:
        recorded: the column, as report.json holds it.
        measured: the same file's figures on the same images.
        precision: of the file: `fp32`, `fp16` or `int8`.
        rules: what decides, so that a decision near its threshold may change.
    """
    wanted = _flat(recorded)
    got = _flat(measured.to_json())
    if set(recorded["ood"]) - set(measured.ood):
        got.pop("ood_auroc", None)  # the mean over other sets
    allowed = _allowed(measured, ROUNDING.get(precision, ROUNDING["fp32"]), rules or {})
    checks = {
        name: _check(value, got[name], allowed.get(name, _LEAST)) if name in got else _missing(name)
        for name, value in wanted.items()
    }
    shown = {f"card: {name}": check for name, check in checks.items() if not name.startswith(_OF_CLASS)}
    return shown | _of_classes({n: check for n, check in checks.items() if n.startswith(_OF_CLASS)})


def _of_classes(checks: Mapping[str, Check]) -> dict[str, Check]:
    """There may be a thousand: those that are off, or one line."""
    off = {f"card: {name}": check for name, check in checks.items() if not check.held}
    return off or {"card: accuracy of each class": Check(f"as expected for {len(checks)} classes", True)}


def _check(wanted: float | None, got: float | None, allowed: float) -> Check:
    if wanted is None or got is None:
        return Check(f"{_text(got)}, expected {_text(wanted)}", wanted is got)
    same = abs(wanted - got) <= allowed
    return Check(f"{got:.7g}, expected {wanted:.7g}, allowed difference {allowed:.1g}", same)


def _missing(name: str) -> Check:
    return Check(f"not compared: {name} was not measured, as its images were not given", None)


def _text(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.7g}"


def _flat(column: Mapping[str, Any]) -> dict[str, float | None]:
    """Every figure by a name of its own."""
    values = {name: figure["value"] for name, figure in column["metrics"].items()}
    for name, figures in column["ood"].items():
        values |= {f"{name} {kind}": figure["value"] for kind, figure in figures.items()}
    values |= {f"{_OF_CLASS}{name}": figure["value"] for name, figure in column["per_class"].items()}
    return values | {name: figure["value"] for name, figure in column.get("decisions", {}).items()}


def _allowed(measured: Evaluation, rounding: float, rules: Deciders) -> dict[str, float]:
    """How far each figure may be off."""
    exact = {name: value for name, value in _flat(measured.to_json()).items() if value is not None}
    worst = dict.fromkeys(exact, 0.0)
    random = np.random.default_rng(0)
    for draw in range(_DRAWS):
        moved = _figures(measured, rounding, rules, draw, random)
        for name, value in moved.items():
            if name in exact and not math.isnan(value):
                worst[name] = max(worst[name], abs(value - exact[name]))
    return {name: _MARGIN * value + _LEAST for name, value in worst.items()}


def _figures(
    measured: Evaluation, rounding: float, rules: Deciders, draw: int, random: np.random.Generator
) -> dict[str, float]:
    """The figures of answers that were rounded differently: all logits stretched, then shrunk, then moved at random."""

    def shift(values: np.ndarray) -> np.ndarray:
        return rounding * random.uniform(-1, 1, values.shape)

    def moved(scores: np.ndarray) -> np.ndarray:
        exact = scores.astype(np.float64)
        rounded: np.ndarray = exact + shift(exact) * (np.abs(exact) + 0.01 * np.abs(exact).max())
        return rounded

    said = measured.prediction
    p = said.probabilities.astype(np.float64)
    p = np.power(p, 1 + rounding * (1 - 2 * draw)) if draw < 2 else p * (1 + shift(p))
    p /= p.sum(1, keepdims=True)
    uncertainty = moved(said.uncertainty)
    figures = classification_metrics(p, measured.labels, uncertainty)
    inside = moved(said.ood_score)
    for name, outside in measured.ood_scores.items():
        scored = moved(outside)
        figures |= {f"{name} {kind}": metric(inside, scored) for kind, metric in _SCORES.items()}
    if measured.ood_scores:
        figures["ood_auroc"] = float(np.mean([figures[f"{name} auroc"] for name in measured.ood_scores]))
    of_classes = per_class_accuracy(p, measured.labels)
    figures |= {f"{_OF_CLASS}{n}": float(v) for n, v in zip(measured.per_class, of_classes, strict=True)}
    decided = _decided(said, p, uncertainty, rules)
    return figures | {name: figure.value for name, figure in decision_figures(decided, measured.labels).items()}


def _decided(said: Prediction, p: np.ndarray, uncertainty: np.ndarray, rules: Deciders) -> Prediction:
    """The answers after rounding, decided again where the rules are known."""
    looked_at = {"accepted": uncertainty, "prediction_set": p}
    again = {name: rule(looked_at[name].astype(np.float32)) for name, rule in rules.items()}
    return said._replace(label=p.argmax(1), **again)
