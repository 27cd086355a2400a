"""What compression did to each class, and what calibration did to the confidence: before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.stats import binomtest

from compress_uq.calibration import Identity
from compress_uq.data import Splits
from compress_uq.progress import ProgressCallback, silent
from compress_uq.report.evaluation import Evaluation, evaluate
from compress_uq.uncertain import UncertainModel

__all__ = ["calibration_change", "class_changes", "lost_classes", "uncalibrated"]

_ALPHA = 0.05
_CALIBRATED = ("ece", "nll", "brier")


def class_changes(dense: Evaluation, compressed: Evaluation) -> list[dict[str, Any]]:
    """Of each class: accuracy before and after, images lost and gained, and the p-value of the exact McNemar test.

    The test is two-sided, on the images that one model classifies right and the other wrong (McNemar 1947).
    """
    before = np.asarray(dense.prediction.label) == dense.labels
    after = np.asarray(compressed.prediction.label) == compressed.labels
    rows = []
    for number, name in enumerate(dense.per_class):
        of_class = dense.labels == number
        lost, gained = int((before & ~after & of_class).sum()), int((~before & after & of_class).sum())
        p = float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
        first, second = dense.per_class[name].to_json()["value"], compressed.per_class[name].to_json()["value"]
        change = None if first is None or second is None else second - first
        rows.append({
            "class": name, "dense": first, "compressed": second, "change": change, "lost": lost, "gained": gained,
            "p_value": p,
        })  # fmt: skip
    return rows


def lost_classes(changes: Sequence[Mapping[str, Any]]) -> list[str]:
    """A warning that names the classes whose accuracy fell significantly (5 % over all classes, Bonferroni)."""
    worse = [row for row in changes if row["lost"] > row["gained"] and row["p_value"] < _ALPHA / len(changes)]
    if not worse:
        return []
    worst = sorted(worse, key=lambda row: row["change"])[:5]
    named = ", ".join(f"{row['class']} {row['dense']:.3f} to {row['compressed']:.3f}" for row in worst)
    more = f" and {len(worse) - 5} more" if len(worse) > 5 else ""
    return [f"compression cost these classes more than chance explains: {named}{more}"]


def uncalibrated(
    model: UncertainModel, splits: Splits, *, device: str = "cpu", progress: ProgressCallback = silent
) -> Evaluation | None:
    """Figures on test of a model as its members give them; None where nothing calibrates it."""
    if model.calibrator.name == "none":
        return None
    plain = model.but(calibrator=Identity(), acceptance=None, sets=None)
    return evaluate(plain, replace(splits, ood={}), device=device, progress=progress, stage="not calibrated")


def calibration_change(before: Evaluation | None, after: Evaluation, calibrator: str) -> dict[str, Any] | None:
    """ECE, NLL and Brier score on the same images without the calibrator and with it; None where there is none."""
    if before is None:
        return None
    return {
        "before": {"calibration": "none", **{name: before.metrics[name].to_json() for name in _CALIBRATED}},
        "after": {"calibration": calibrator, **{name: after.metrics[name].to_json() for name in _CALIBRATED}},
    }
