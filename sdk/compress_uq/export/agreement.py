"""When two ways of running one graph give the same answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from compress_uq.decisions import ACCEPTANCE_RULES, SET_RULES, Rule
from compress_uq.errors import GateError
from compress_uq.registry import Registry
from compress_uq.types import DECISION_NAMES

__all__ = ["DECIDED_ON", "LIKENESS", "TOLERANCE", "Likeness", "agree", "alike", "drawn_alike"]

Answers = Mapping[str, np.ndarray]

TOLERANCE = 1e-4
"""Largest difference of a probability between two ways of running one graph."""

_SIGMAS = 8
"""Averages over a few draws have wide tails."""

_IN_UNIT = ("probabilities", "confidence", "variance")
"""Outputs between 0 and 1, held to the tolerance as it stands; the others to ten times that share of their size."""

DECIDED_ON: dict[str, tuple[str, Registry[Any]]] = {
    "accepted": ("uncertainty", ACCEPTANCE_RULES),
    "prediction_set": ("probabilities", SET_RULES),
}
"""What a decision looks at, and where its rule is found."""


@dataclass(frozen=True)
class Likeness:
    """How near a file in short numbers comes to float32, and to itself unoptimised, which rounds elsewhere."""

    moved: float
    """Mean over images of the share of probability that lies on other classes: half the sum of absolute differences."""
    margin: float
    """Labels may differ only where the two most probable classes are nearer than this."""


LIKENESS = {"fp16": Likeness(0.01, 0.05), "int8": Likeness(0.1, 0.5)}
"""About four times what a CIFAR-10 ResNet-20 shows, and far less than what clipped ranges or a lost bias do."""


def alike(got: Answers, wanted: Answers, likeness: Likeness) -> str:
    """Whether answers, by output, are as near as short numbers let them be; how near they are.

    Raises:
        GateError: they are not.
    """
    p, q = (side["probabilities"].astype(np.float64) for side in (got, wanted))
    moved = float(np.abs(p - q).sum(1).mean() / 2)
    same = got["label"] == wanted["label"]
    flipped = ~same & (_margin(wanted["probabilities"]) > likeness.margin)
    if flipped.any():
        raise GateError(f"{int(flipped.sum())} of {len(p)} labels differ that are not close calls")
    if not moved <= likeness.moved:
        raise GateError(f"{moved:.3g} of the probability lies elsewhere, allowed {likeness.moved:g}")
    return f"{moved:.2g} of the probability moved, {same.mean():.1%} of {len(p)} labels the same"


def agree(got: Answers, wanted: Answers, rules: Mapping[str, Rule]) -> str:
    """Whether answers, by output, are the same but for rounding in float32; the largest difference.

    Raises:
        GateError: they are not.
    """
    worst = 0.0
    for name, a in got.items():
        b = wanted[name]
        if name == "label":
            clear = _margin(wanted["probabilities"]) > 2 * TOLERANCE
            if (a != b)[clear].any():
                raise GateError("labels differ")
            continue
        if name in DECISION_NAMES:
            if (a != b)[_clear(rules[name], name, got, wanted)].any():
                raise GateError(f"{name} differs where nothing is near the threshold")
            continue
        with np.errstate(invalid="ignore"):
            difference = float(np.abs(a.astype(np.float64) - b).max())
        allowed = TOLERANCE * (1 if name in _IN_UNIT else 10 * max(1.0, float(np.abs(b).max())))
        if not difference <= allowed:
            raise GateError(f"{name} differs by {difference:.3g}, allowed {allowed:.3g}")
        worst = max(worst, difference)
    return f"largest difference {worst:.2g}"


def drawn_alike(got: Sequence[Answers], wanted: Sequence[Answers]) -> str:
    """Whether answers that are drawn anew at each call come from one distribution: their averages over calls.

    Raises:
        GateError: an average differs by more than chance lets it.
    """
    worst = 0.0
    for name in ("confidence", "entropy", "mutual_information"):
        a, b = (np.stack([answers[name] for answers in side]).astype(np.float64) for side in (got, wanted))
        error = np.sqrt((a.var(0, ddof=1) + b.var(0, ddof=1)) / len(a))
        difference = np.abs(a.mean(0) - b.mean(0))
        far = difference > _SIGMAS * error + 10 * TOLERANCE
        if far.any():
            image = int(far.argmax())
            raise GateError(
                f"{name} of random samples is {a.mean(0)[image]:.3g} on average, expected {b.mean(0)[image]:.3g}"
            )
        worst = max(worst, float(difference.max()))
    return f"averages over {len(got)} draws differ by at most {worst:.2g}"


def _clear(rule: Rule, name: str, got: Answers, wanted: Answers) -> np.ndarray:
    """Where a decision does not hang on rounding: either side's values, and a threshold slightly higher or lower,
    decide alike."""
    a, b = (torch.from_numpy(np.ascontiguousarray(side[DECIDED_ON[name][0]])) for side in (got, wanted))
    shift = 10 * TOLERANCE * max(1.0, float(b.abs().max()))
    low, high = (type(rule)(rule.options, threshold=rule.threshold + sign * shift)(b) for sign in (-1, 1))
    clear: np.ndarray = ((low == high) & (rule(a) == rule(b))).numpy()
    return clear


def _margin(probabilities: np.ndarray) -> Any:
    ordered = np.sort(probabilities, axis=1)
    return ordered[:, -1] - ordered[:, -2]
