"""The one module that is evaluated, saved and exported."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress_uq.calibration import Calibrator, Identity
from compress_uq.stages import Origin
from compress_uq.types import Prediction
from compress_uq.uq import Members, Method

__all__ = ["UncertainModel", "summarise"]

_TINY = 1e-12


class UncertainModel(nn.Module):
    """Members, a calibrator, and the arithmetic that makes a `Prediction` of them; always as in eval.

    Before `calibrate` the calibrator is `none`.
    """

    def __init__(
        self,
        members: Members,
        method: Method,
        origin: Origin,
        calibrator: Calibrator | None = None,
    ) -> None:
        super().__init__()
        self.members = members
        self.calibrator = Identity() if calibrator is None else calibrator
        self.method, self.origin = method, origin
        self.train(False)

    def train(self, mode: bool = True) -> UncertainModel:
        """Stays as in eval whatever is asked: batch norm and dropout of a deployed model do not learn."""
        return super().train(False)

    def forward(self, images: Tensor, seed: Tensor | None = None) -> Prediction:
        """Images (N, C, H, W) to a `Prediction`; `seed` (N,) int64 only where the sampling is seeded."""
        return summarise(self.calibrator.logits(self.members(images, seed)))

    def member_logits(self, images: Tensor) -> Tensor:
        """Uncalibrated logits of every member, (T, N, K) float32."""
        return self.members(images)  # type: ignore[no-any-return]


def summarise(logits: Tensor) -> Prediction:
    """The figures of `Prediction` from members' calibrated logits (T, N, K), in float32.

    Mutual information is H(mean p) - mean H(p) (Smith and Gal 2018, equation 3), 0 for one member.
    """
    log_members = torch.log_softmax(logits.float(), 2)
    members = log_members.exp()
    probabilities = members.mean(0)
    confidence, label = probabilities.max(1)
    entropy = -(probabilities * probabilities.clamp_min(_TINY).log()).sum(1)
    if len(logits) == 1:
        mutual_information = variance = entropy * 0
    else:
        expected = -(members * log_members.clamp_min(-80.0)).sum(2).mean(0)
        mutual_information = (entropy - expected).clamp_min(0.0)
        index = label.reshape(1, -1, 1).expand(len(logits), -1, 1)
        chosen = members.gather(2, index).squeeze(2)
        variance = (chosen - chosen.mean(0, keepdim=True)).square().mean(0)
    return Prediction(
        probabilities=probabilities,
        label=label,
        confidence=confidence,
        uncertainty=1 - confidence,
        entropy=entropy,
        mutual_information=mutual_information,
        variance=variance,
        ood_score=entropy * 1.0,
    )
