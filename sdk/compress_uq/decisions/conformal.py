"""Prediction sets that hold the truth as often as was asked for (split conformal prediction)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from compress_uq.data import divide
from compress_uq.decisions.base import SetRule, images_and_values
from compress_uq.errors import DecisionError, UnknownNameError
from compress_uq.fitted import Plain
from compress_uq.metrics.arrays import checked

__all__ = ["LAC", "RAPS", "check_coverage", "conformal_rank"]

_PENALTIES = (0.001, 0.01, 0.1, 0.2, 0.5)
"""Those that the authors try."""
_TUNING_SHARE = 5
"""One in five images chooses the options of RAPS."""


class LAC(SetRule):
    """The classes whose probability is at least a threshold, and always the answer (Sadinle et al. 2019).

    The truth is in the set with probability at least `coverage`, over images and the ones it is fitted on. A set would
    be empty where no class is probable enough; the answer is put in, and the threshold is chosen with it in, so that
    what this adds in coverage is not paid for twice.
    """

    name = "lac"

    @classmethod
    def fit(
        cls,
        probabilities: np.ndarray,
        labels: np.ndarray,
        *,
        coverage: float,
        options: Mapping[str, Plain] | None = None,
    ) -> LAC:
        """The ceil((N + 1) coverage)-th largest probability of the truth, that of an answer counting as 1.

        Raises:
            DecisionError: a coverage that N images cannot give (says the highest), or NaN.
            DataError: rows that are no probabilities, or labels that are no classes of them.
            UnknownNameError: it has no options.
        """
        for name in options or {}:
            raise UnknownNameError("option of lac", name, ())
        count = _checked(probabilities, labels)
        of_truth = probabilities[np.arange(count), labels].astype(np.float32)
        of_truth[of_truth >= probabilities.max(1)] = 1.0
        threshold = torch.tensor(np.sort(of_truth)[::-1][conformal_rank(count, coverage) - 1])
        return cls({"coverage": coverage, "images": count}, threshold=threshold)

    def forward(self, probabilities: Tensor) -> Tensor:
        """(N, K) bool."""
        self.require_fitted()
        return (probabilities >= self.threshold) | (probabilities >= probabilities.amax(1, keepdim=True))


class RAPS(SetRule):
    """The most probable classes until they add up to a threshold, late ones penalised (Angelopoulos et al. 2021,
    equation 4 with u = 0).

    A class of rank r scores the sum of the probabilities above its own + penalty * max(0, r - free); the set holds the
    classes that score at most the threshold. The answer scores 0, so no set is empty. Not randomised: the same image
    always gets the same set. With u = 1, a class's own probability in its score, sets would be empty for the surest
    images and several times as large for the others. Classes that tie come in together. The truth is in the set with
    probability at least `coverage`, over images and the ones it is fitted on.
    """

    name = "raps"

    @classmethod
    def threshold_images(cls, images: int, options: Mapping[str, Plain] | None = None) -> int:
        """Four of five, unless both options are given."""
        return images if _given(options) else images - images // _TUNING_SHARE

    @classmethod
    def fit(
        cls,
        probabilities: np.ndarray,
        labels: np.ndarray,
        *,
        coverage: float,
        options: Mapping[str, Plain] | None = None,
    ) -> RAPS:
        """The ceil((N + 1) coverage)-th smallest score of the truth.

        `penalty` and `free`, unless both are given, are chosen on one image in five, which then has no say in the
        threshold: `free` is the rank that the truth reaches as often as asked for, `penalty` what makes sets smallest.

        Raises:
            DecisionError: a coverage that the images cannot give (says the highest), or NaN.
            DataError: rows that are no probabilities, or labels that are no classes of them.
            UnknownNameError: another option.
        """
        chosen = dict(options or {})
        for name in chosen:
            if name not in ("penalty", "free"):
                raise UnknownNameError("option of raps", name, ("penalty", "free"))
        count = _checked(probabilities, labels)
        check_coverage(coverage)
        rest = np.arange(count)
        if not _given(options):
            if count < 2 * _TUNING_SHARE:
                raise DecisionError(f"raps chooses its options on images, and {count} are too few: give penalty, free")
            tuning, *others = divide(labels, _TUNING_SHARE)
            rest = np.sort(np.concatenate(others))
            chosen = _choose(probabilities[tuning], labels[tuning], coverage, chosen)
        if not float(chosen["penalty"]) >= 0 or not float(chosen["free"]) >= 0:
            raise DecisionError(f"raps: penalty {chosen['penalty']}, free {chosen['free']}: expected 0 or more of both")
        rank = conformal_rank(len(rest), coverage)
        scores = _truths(torch.from_numpy(probabilities[rest]), torch.from_numpy(labels[rest]), chosen)
        kept = {"penalty": float(chosen["penalty"]), "free": int(chosen["free"])}
        return cls({"coverage": coverage, "images": len(rest), **kept}, threshold=scores.sort().values[rank - 1])

    def forward(self, probabilities: Tensor) -> Tensor:
        """(N, K) bool."""
        self.require_fitted()
        ordered, scores = _ranked(probabilities, self.options)
        size = (scores <= self.threshold).sum(1, keepdim=True).clamp_min(1)
        return probabilities >= ordered.gather(1, size - 1)


def _given(options: Mapping[str, Plain] | None) -> bool:
    """Whether nothing is left to choose for RAPS."""
    return {"penalty", "free"} <= set(options or {})


def conformal_rank(images: int, coverage: float) -> int:
    """ceil((N + 1) coverage), the order statistic that makes the coverage hold for N images.

    Raises:
        DecisionError: N images are too few (says the highest coverage they give), or not a share.
    """
    check_coverage(coverage)
    rank = math.ceil((images + 1) * coverage - 1e-9)
    if rank > images:
        raise DecisionError(
            f"coverage {coverage:g} cannot be had with {images} images: the highest is {images / (images + 1):.4f}; "
            "ask for less or give more images"
        )
    return rank


def check_coverage(coverage: float) -> None:
    """Refuse what no images could give.

    Raises:
        DecisionError: not above 0 and below 1.
    """
    if not 0 < coverage < 1:
        hint = "; only the set of all classes always holds the truth" if coverage == 1 else ""
        raise DecisionError(f"coverage {coverage:g}: expected a share above 0 and below 1{hint}")


def _checked(probabilities: np.ndarray, labels: np.ndarray) -> int:
    """N, of probabilities (N, K) and labels (N,)."""
    images_and_values(probabilities, labels, "probabilities")
    return len(checked(probabilities, labels).labels)


def _ranked(probabilities: Tensor, options: Mapping[str, Plain]) -> tuple[Tensor, Tensor]:
    """Probabilities (N, K) in falling order and the score of each rank (N, K), which rises."""
    classes = probabilities.shape[1]
    ordered = torch.topk(probabilities, classes, dim=1).values
    late = torch.arange(1, classes + 1, device=probabilities.device) - int(options["free"])
    above = torch.cat([ordered[:, :1] * 0, ordered.cumsum(1)[:, :-1]], 1)
    return ordered, above + late.clamp_min(0).to(ordered.dtype) * float(options["penalty"])


def _truths(probabilities: Tensor, labels: Tensor, options: Mapping[str, Plain]) -> Tensor:
    """The score of the true class (N,), in the arithmetic of the forward; the first of its rank among equals."""
    ordered, scores = _ranked(probabilities, options)
    of_truth = probabilities.gather(1, labels[:, None])
    return scores.gather(1, (ordered > of_truth).sum(1, keepdim=True))[:, 0]


def _choose(
    probabilities: np.ndarray, labels: np.ndarray, coverage: float, given: Mapping[str, Plain]
) -> dict[str, Plain]:
    """The options that give the smallest sets on these images."""
    p, y = torch.from_numpy(probabilities), torch.from_numpy(labels)
    ranks = (p > p.gather(1, y[:, None])).sum(1).sort().values
    place = min(math.ceil((len(y) + 1) * coverage - 1e-9), len(y)) - 1
    free = given.get("free", int(ranks[place]) + 1)
    sizes = {}
    for penalty in [given["penalty"]] if "penalty" in given else _PENALTIES:
        options = {"penalty": penalty, "free": free}
        rule = RAPS(options, threshold=_truths(p, y, options).sort().values[place])
        sizes[penalty] = float(rule(p).sum(1).double().mean())
    return {"penalty": min(sizes, key=lambda penalty: sizes[penalty]), "free": free}
