"""What is minimised."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress_uq.config import TrainingConfig
from compress_uq.data import ImageDataset, labels_of
from compress_uq.errors import DataError
from compress_uq.models import as_logits

__all__ = ["TrainingLoss", "class_weights"]


class TrainingLoss:
    """Cross-entropy, mixed with distillation where there is a teacher."""

    def __init__(self, config: TrainingConfig, weights: Tensor | None, teacher: nn.Module | None) -> None:
        self._share = config.distillation_weight if teacher is not None else 0.0
        self._temperature = config.distillation_temperature
        self._weights, self._teacher = weights, teacher

    def __call__(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """The scalar loss of float images (N, C, H, W), logits (N, K) and int64 labels (N,)."""
        loss = F.cross_entropy(logits, labels, reduction="none")
        if self._teacher is not None and self._share > 0:
            with torch.no_grad():
                target = F.log_softmax(as_logits(self._teacher(images)).float() / self._temperature, 1)
            student = F.log_softmax(logits / self._temperature, 1)
            divergence = F.kl_div(student, target, reduction="none", log_target=True).sum(1)
            loss = (1 - self._share) * loss + self._share * self._temperature**2 * divergence
        if self._weights is None:
            return loss.mean()
        weights = self._weights[labels]
        return (weights * loss).sum() / weights.sum().clamp_min(1e-12)


def class_weights(config: TrainingConfig, train: ImageDataset, device: torch.device) -> Tensor | None:
    """Weights (K,), float32; `balanced` is the inverse of a class's share. None where all weigh alike.

    Raises:
        DataError: fewer weights than classes.
    """
    if config.class_weights == "none":
        return None
    if config.class_weights == "balanced":
        counts = torch.bincount(labels_of(train)).float()
        return (counts.sum() / (len(counts) * counts.clamp_min(1))).to(device)
    weights = torch.tensor(config.class_weights, device=device)
    classes = int(labels_of(train).max()) + 1
    if len(weights) < classes:
        raise DataError(f"{len(weights)} class weights given: the data have {classes} classes")
    return weights
