"""Which calibrator: the simplest that is as good as the best, by cross-validated likelihood."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from compress_uq.calibration.base import Calibrator
from compress_uq.calibration.by_name import AUTO, CALIBRATORS, check_name
from compress_uq.calibration.images import label_nll, refuse_unusable, spread_folds
from compress_uq.errors import CalibrationError, MissingDependencyError

__all__ = ["Choice", "calibrated", "choose", "fit_calibrator"]

_FOLDS = 5
_CHUNK = 4_000_000


@dataclass(frozen=True)
class Choice:
    """The calibrator that was chosen, and what it was chosen from."""

    name: str
    nll: Mapping[str, float]
    """Cross-validated NLL of every candidate, nats."""
    behind: Mapping[str, tuple[float, float]]
    """How far each one's NLL is above the lowest, and the standard error of that difference over images."""
    skipped: Mapping[str, str]
    """Candidates that could not be fitted, and why."""
    folds: int

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        behind = {name: list(values) for name, values in self.behind.items()}
        return {**vars(self), "nll": dict(self.nll), "behind": behind, "skipped": dict(self.skipped)}


def choose(logits: np.ndarray, labels: np.ndarray, seed: int = 0) -> Choice:
    """The simplest calibrator whose cross-validated NLL is within one standard error of the lowest.

    Every calibrator is a candidate, `none` too; simplest is the one with the fewest parameters. The standard error is
    that of the difference between two candidates over the same images, which is far smaller than that of either.

    Args:
        logits: of members (T, N, K).
        labels: (N,) int.
        seed: draws the folds, which are balanced by class.

    Raises:
        CalibrationError: NaN or infinite logits, or fewer images than classes.
    """
    refuse_unusable(AUTO, logits, labels)
    folds = min(_FOLDS, len(labels))
    fold = spread_folds(labels, folds, seed)
    terms: dict[str, np.ndarray] = {}
    skipped: dict[str, str] = {}
    for entry in CALIBRATORS:
        try:
            terms[entry.name] = _held_out_nll(entry.value, logits, labels, fold)
        except (CalibrationError, MissingDependencyError) as error:
            skipped[entry.name] = str(error)
    nll = {name: float(values.mean()) for name, values in terms.items()}
    best = terms[min(nll, key=lambda name: nll[name])]
    behind = {name: _difference(values, best) for name, values in terms.items()}
    name = next(name for name, (gap, error) in behind.items() if gap <= error)
    return Choice(name, nll, behind, skipped, folds)


def fit_calibrator(method: str, logits: np.ndarray, labels: np.ndarray, seed: int = 0) -> Calibrator:
    """A calibrator fitted on members' logits (T, N, K) and labels (N,); for `auto` the one that `choose` finds.

    Raises:
        UnknownNameError: no such calibrator.
        CalibrationError: nothing to fit.
        MissingDependencyError: it is fitted by netcal, which is not installed.
    """
    check_name(method)
    if method != AUTO:
        return CALIBRATORS[method].fit(logits, labels)
    choice = choose(logits, labels, seed)
    fitted = CALIBRATORS[choice.name].fit(logits, labels)
    fitted.choice = choice.to_json()
    return fitted


def calibrated(calibrator: Calibrator, logits: np.ndarray) -> np.ndarray:
    """Probabilities (N, K) float32 that a calibrator makes of members' logits (T, N, K)."""
    members, count, classes = logits.shape
    step = max(1, _CHUNK // (members * classes))
    parts = []
    with torch.no_grad():
        for first in range(0, count, step):
            chunk = torch.from_numpy(logits[:, first : first + step]).float()
            mean = torch.softmax(calibrator.logits(chunk), 2).mean(0)
            parts.append(calibrator.probabilities(mean).numpy())
    return np.concatenate(parts)


def _held_out_nll(kind: type[Calibrator], logits: np.ndarray, labels: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """NLL (N,) of each image under a calibrator that was fitted without its fold."""
    terms = np.empty(len(labels))
    for number in np.unique(fold):
        outside = fold == number
        fitted = kind.fit(logits[:, ~outside], labels[~outside])
        terms[outside] = label_nll(calibrated(fitted, logits[:, outside]).astype(np.float64), labels[outside])
    return terms


def _difference(values: np.ndarray, best: np.ndarray) -> tuple[float, float]:
    """Mean of values - best over images, and its standard error."""
    apart = values - best
    return float(apart.mean()), float(apart.std(ddof=1) / np.sqrt(len(apart)))
