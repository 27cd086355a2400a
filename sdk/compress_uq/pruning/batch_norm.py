"""Batch norm's statistics, estimated anew once channels are gone."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from compress_uq.batch_norm import batch_norms, estimate_statistics
from compress_uq.pruning.criteria.criterion import Evidence

__all__ = ["recalibrate_batch_norm"]

IMAGES = 2048


def recalibrate_batch_norm(model: nn.Module, evidence: Evidence, modes: Mapping[str, bool]) -> None:
    """Replace running means and variances by those of training images, the average over batches; weights stay.

    Batch norm that its owner froze (no gradient, or in eval mode inside a model in training mode) is left alone.
    """
    layers = [
        layer
        for name, layer in batch_norms(model).items()
        if (modes[name] or not modes[""]) and all(p.requires_grad for p in layer.parameters())
    ]
    if layers:
        images = evidence.images("batch-norm recalibration", IMAGES)
        estimate_statistics(model, layers, (batch for batch, _ in images))
