"""What decision rules come to on images with known labels, and what they promised, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.stats import betabinom

from compress_uq.decisions import conformal_rank
from compress_uq.metrics import Figure, mean_set_size, set_coverage, wilson
from compress_uq.types import Prediction

__all__ = ["DECISIONS", "broken", "decision_figures", "guarantees"]

DECISIONS: Mapping[str, str] = {
    "acceptance_coverage": "share of images accepted",
    "selective_risk": "share of wrong answers among the accepted",
    "set_coverage": "share of images whose label is in the set",
    "set_size": "mean number of classes in a set",
    "set_singletons": "share of sets of one class",
    "set_empty": "share of empty sets",
}
"""Figures of the card, with what they are."""


def decision_figures(prediction: Prediction, labels: np.ndarray) -> dict[str, Figure]:
    """Figures of a prediction's `accepted` and `prediction_set`, as far as they are there, with 95 % intervals.

    Shares have Wilson intervals, the mean size one of the normal approximation. Without an accepted image there is no
    risk: it is NaN.
    """
    figures: dict[str, Figure] = {}
    count = len(labels)
    if prediction.accepted is not None:
        accepted = np.asarray(prediction.accepted)
        wrong = (np.asarray(prediction.label) != labels)[accepted]
        figures["acceptance_coverage"] = wilson(float(accepted.mean()), count)
        figures["selective_risk"] = wilson(float(wrong.mean()) if len(wrong) else float("nan"), len(wrong))
    if prediction.prediction_set is not None:
        sets = np.asarray(prediction.prediction_set)
        sizes = sets.sum(1)
        half = 1.96 * float(sizes.std()) / float(np.sqrt(count))
        mean = mean_set_size(sets)
        figures["set_coverage"] = wilson(set_coverage(sets, labels), count)
        figures["set_size"] = Figure(mean, mean - half, mean + half)
        figures["set_singletons"] = wilson(float((sizes == 1).mean()), count)
        figures["set_empty"] = wilson(float((sizes == 0).mean()), count)
    return figures


def guarantees(answers: Mapping[str, Any]) -> dict[str, str]:
    """What a model's record promises of its decisions, as sentences by the name of the output."""
    said: dict[str, str] = {}
    rule = answers.get("acceptance")
    if rule is not None:
        said["accepted"] = (
            f"{rule['rule']}: the risk of accepted answers is at most {rule['risk']:g} with probability "
            f"{1 - rule['delta']:g}; bound {rule['bound']:.4f} at coverage {rule['coverage']:.4f} {_from(rule)}"
        )
    rule = answers.get("sets")
    if rule is not None:
        said["prediction_set"] = (
            f"{rule['rule']}: holds the label with probability at least {rule['coverage']:g} {_from(rule)}"
        )
    return said


def broken(figures: Mapping[str, Figure], answers: Mapping[str, Any], images: int) -> list[str]:
    """Promises that a measurement on so many images contradicts at 2.5 %, in words.

    A risk is broken where its whole interval lies beyond it. Coverage is promised on average over the images that a
    rule is fitted on; given n of them it is Beta(k, n + 1 - k), k the rank of the threshold (Vovk 2012), so that the
    labels in the sets of `images` others are beta-binomial.
    """
    found = []
    risk, coverage = figures.get("selective_risk"), figures.get("set_coverage")
    if risk is not None and "acceptance" in answers and risk.low > answers["acceptance"]["risk"]:
        found.append(
            f"the risk of accepted answers is {risk.value:.4f} on test and was to be at most "
            f"{answers['acceptance']['risk']:g}: test images are unlike those that the rule was fitted on"
        )
    if coverage is not None and "sets" in answers and _too_few(coverage.value, images, answers["sets"]):
        found.append(
            f"prediction sets hold {coverage.value:.4f} of the labels on test and were to hold "
            f"{answers['sets']['coverage']:g}: test images are unlike those that the rule was fitted on"
        )
    return found


def _too_few(share: float, images: int, rule: Mapping[str, Any]) -> bool:
    """Whether so few hits have a probability below 2.5 % for a rule that keeps its promise."""
    rank = conformal_rank(rule["images"], rule["coverage"])
    return bool(betabinom.cdf(round(share * images), images, rank, rule["images"] + 1 - rank) < 0.025)


def _from(rule: Mapping[str, Any]) -> str:
    return f"(fitted on {rule['from']})"
