"""The one module that is evaluated, saved and exported."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress_uq.calibration import Calibrator, Identity
from compress_uq.decisions import AcceptanceRule, SetRule
from compress_uq.scores import Answers, Confidence, Entropy, Score
from compress_uq.stages import Origin
from compress_uq.types import Prediction
from compress_uq.uq import MSP, Ensemble, Members, Method, Trained

__all__ = ["UncertainModel", "answers_of", "as_given", "summarise"]

_TINY = 1e-12


class UncertainModel(nn.Module):
    """Members, a calibrator, scores and decision rules; the arithmetic that makes a `Prediction` of them.

    Always as in eval. Before `calibrate` the calibrator is `none`; before `choose_scores` the uncertainty is
    1 - confidence and the OOD score the entropy; before `decide` there are no decisions.
    """

    def __init__(
        self,
        members: Members,
        method: Method,
        origin: Origin,
        *,
        calibrator: Calibrator | None = None,
        score: Score | None = None,
        ood_score: Score | None = None,
        acceptance: AcceptanceRule | None = None,
        sets: SetRule | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.members = members
        self.calibrator: Calibrator = calibrator or Identity()
        self.score: Score = score or Confidence()
        self.ood_score: Score = ood_score or Entropy()
        self.acceptance, self.sets = acceptance, sets
        self.method, self.origin = method, origin
        self.record: dict[str, Any] = dict(record or {})
        """How scores and rules were found, and on which images; plain values."""
        self.train(False)

    def train(self, mode: bool = True) -> UncertainModel:
        """Stays as in eval whatever is asked: batch norm and dropout of a deployed model do not learn."""
        return super().train(False)

    def but(self, **parts: Any) -> UncertainModel:
        """A copy with other parts: `calibrator`, `score`, `ood_score`, `acceptance`, `sets`, `record`."""
        other = copy.deepcopy(self)
        for name, part in parts.items():
            setattr(other, name, part)
        return other.train(False)

    def forward(self, images: Tensor, seed: Tensor | None = None) -> Prediction:
        """Images (N, C, H, W) to a `Prediction`; `seed` (N,) int64 only where the sampling is seeded."""
        features = None
        if self.score.of_features or self.ood_score.of_features:
            logits, features = self.members.with_features(images, seed)
        else:
            logits = self.members(images, seed)
        return summarise(
            logits, features, calibrator=self.calibrator, score=self.score, ood_score=self.ood_score,
            acceptance=self.acceptance, sets=self.sets,
        )  # fmt: skip

    def member_logits(self, images: Tensor) -> Tensor:
        """Uncalibrated logits of every member, (T, N, K) float32."""
        return self.members(images)  # type: ignore[no-any-return]


def as_given(models: Sequence[nn.Module], origin: Origin) -> UncertainModel:
    """Models as they are: the softmax of one, the mean softmax of several.

    Raises:
        UncertaintyError: several that do not go together.
    """
    method = MSP() if len(models) == 1 else Ensemble(len(models))
    return UncertainModel(method.fit(Trained(tuple(models), origin)), method, origin)


def summarise(
    logits: Tensor,
    features: Tensor | None = None,
    *,
    calibrator: Calibrator | None = None,
    score: Score | None = None,
    ood_score: Score | None = None,
    acceptance: AcceptanceRule | None = None,
    sets: SetRule | None = None,
) -> Prediction:
    """The figures of `Prediction` from members' logits (T, N, K) as they come, in float32."""
    answers = answers_of(logits, features, calibrator)
    confidence, label = answers.probabilities.max(1)
    uncertainty = (score or Confidence())(answers)
    return Prediction(
        probabilities=answers.probabilities,
        label=label,
        confidence=confidence,
        uncertainty=uncertainty,
        entropy=answers.entropy,
        mutual_information=answers.mutual_information,
        variance=answers.variance,
        ood_score=(ood_score or Entropy())(answers),
        accepted=None if acceptance is None else acceptance(uncertainty),
        prediction_set=None if sets is None else sets(answers.probabilities),
    )


def answers_of(logits: Tensor, features: Tensor | None = None, calibrator: Calibrator | None = None) -> Answers:
    """What scores look at, from members' logits (T, N, K) as they come, in float32.

    Mutual information is H(mean p) - mean H(p) (Smith and Gal 2018, equation 3), 0 for one member, taken from the
    members as they enter the mean, before a calibrator that acts on the mean.
    """
    raw = logits.float()
    calibrator = calibrator or Identity()
    log_members = torch.log_softmax(calibrator.logits(raw), 2)
    members = log_members.exp()
    mean = members.mean(0)
    probabilities = calibrator.probabilities(mean)
    label = probabilities.argmax(1)
    entropy = _entropy(probabilities)
    if len(logits) == 1:
        mutual_information = variance = entropy * 0
    else:
        of_mean = entropy if probabilities is mean else _entropy(mean)
        expected = -(members * log_members.clamp_min(-80.0)).sum(2).mean(0)
        mutual_information = (of_mean - expected).clamp_min(0.0)
        index = label.reshape(1, -1, 1).expand(len(logits), -1, 1)
        chosen = members.gather(2, index).squeeze(2)
        variance = (chosen - chosen.mean(0, keepdim=True)).square().mean(0)
    return Answers(raw, probabilities, entropy, mutual_information, variance, features)


def _entropy(probabilities: Tensor) -> Tensor:
    """Shannon entropy (N,) of rows (N, K), nats."""
    return -(probabilities * probabilities.clamp_min(_TINY).log()).sum(1)
