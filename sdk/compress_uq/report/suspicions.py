"""Signs that a figure cannot be believed, in words."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from compress_uq.calibration import Identity
from compress_uq.data import ImageDataset, Splits
from compress_uq.metrics import random_ause
from compress_uq.predict import collect
from compress_uq.report.evaluation import Evaluation
from compress_uq.uncertain import UncertainModel

__all__ = ["near_chance", "of_compressed", "suspicions"]

_OF_COMPRESSED = (
    "compressed is not calibrated",
    "accuracy is ",
    "the uncertainty ranks errors worse ",
    "the uncertainty tells errors from right answers worse ",
    "compression cost these classes ",
    "the risk of accepted answers is ",
    "prediction sets hold ",
)
"""How warnings begin that are about figures of `compressed` and `onnx`."""


def near_chance(dense: Evaluation) -> list[str]:
    """A model as it was given that does little better than naming the commonest class."""
    accuracy = dense.metrics["accuracy"].value
    chance = float(np.bincount(dense.labels).max()) / len(dense.labels)
    if accuracy > chance + 0.1 * (1 - chance):
        return []
    return [
        f"the dense model scores {accuracy:.3f} on its own data, near chance: a wrong --mean or --std, or another "
        "order of the classes, is the usual cause"
    ]


def suspicions(model: UncertainModel, splits: Splits, evaluation: Evaluation) -> list[str]:
    """Signs that a figure cannot be believed, each in a sentence."""
    found = []
    if splits.calibration is not None:
        # A calibrator that changes labels is right too often on the images that it was fitted on.
        relabels = model.calibrator.every_class
        plain = model.but(calibrator=Identity()) if relabels else model
        right, count = _right(plain, splits.calibration)
        test_right = int((evaluation.prediction.label == evaluation.labels).sum())
        if relabels:
            test_right, _ = _right(plain, splits.require("test", "the report card"))
        z = _two_shares(right, count, test_right, len(evaluation.labels))
        if z > 2.33:
            found.append(
                f"accuracy is {right / count:.4f} on the calibration split and "
                f"{test_right / len(evaluation.labels):.4f} on test, significantly higher "
                "(one-sided 1 %): the model may have been trained on calibration images"
            )
    prediction = evaluation.prediction
    bar = random_ause(prediction.probabilities, evaluation.labels)
    if evaluation.metrics["ause"].value > bar > 0:
        found.append(
            "the uncertainty ranks errors worse than a random order: "
            f"AUSE {evaluation.metrics['ause'].value:.4f}, random {bar:.4f}"
        )
    return found + _worse_than_random(evaluation)


def of_compressed(warning: str, ood: Iterable[str]) -> bool:
    """Whether a card's warning is outdated when `compressed` is measured again, on other images and these OOD sets."""
    return warning.startswith((*_OF_COMPRESSED, *(f"the OOD score ranks {name} " for name in ood)))


def _worse_than_random(evaluation: Evaluation) -> list[str]:
    """Scores that would rank better the other way round."""
    found = []
    right = evaluation.metrics["error_auroc"].value
    if right < 0.5:
        found.append(f"the uncertainty tells errors from right answers worse than chance: error_auroc {right:.4f}")
    for name, figures in evaluation.ood.items():
        value = figures["auroc"].value
        if value < 0.5:
            found.append(
                f"the OOD score ranks {name} worse than chance, AUROC {value:.4f}: its images pass for in-distribution"
            )
    return found


def _right(model: UncertainModel, dataset: ImageDataset) -> tuple[int, int]:
    """Images classified right, and all of them."""
    (label,), truth = collect(lambda images: model(images).label, dataset)
    return int((label == truth).sum()), len(truth)


def _two_shares(right: int, count: int, other_right: int, other_count: int) -> float:
    """z of the difference of two shares, pooled."""
    pooled = (right + other_right) / (count + other_count)
    spread = math.sqrt(pooled * (1 - pooled) * (1 / count + 1 / other_count))
    return 0.0 if spread == 0 else (right / count - other_right / other_count) / spread
