"""Batch norm's statistics, estimated anew once channels are gone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from compress_uq.pruning.criteria.criterion import Evidence

__all__ = ["recalibrate_batch_norm"]

IMAGES = 2048


@dataclass(frozen=True)
class _Saved:
    module: nn.modules.batchnorm._BatchNorm
    momentum: float | None


def recalibrate_batch_norm(model: nn.Module, evidence: Evidence, modes: Mapping[str, bool]) -> None:
    """Replace running means and variances by those of training images, the average over batches; weights stay.

    Batch norm that its owner froze (no gradient, or in eval mode inside a model in training mode) is left alone.
    """
    saved = [
        _Saved(module, module.momentum)
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.track_running_stats
        and (modes[name] or not modes[""])
        and all(p.requires_grad for p in module.parameters())
    ]
    if not saved:
        return
    model.eval()
    for item in saved:
        item.module.reset_running_stats()
        item.module.momentum = None  # a plain average
        item.module.train()
    try:
        with torch.no_grad():
            for images, _ in evidence.images("batch-norm recalibration", IMAGES):
                if len(images) > 1:
                    model(images)
    finally:
        for item in saved:
            item.module.momentum = item.momentum
        model.eval()
