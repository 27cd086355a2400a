"""Batch norm's statistics, estimated anew from images; nothing else of a network changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["BatchNorm", "batch_norms", "estimate_statistics"]

BatchNorm = nn.modules.batchnorm._BatchNorm


def batch_norms(model: nn.Module) -> dict[str, BatchNorm]:
    """The batch-norm layers that keep running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm) and module.track_running_stats
    }


def estimate_statistics(model: nn.Module, layers: Sequence[BatchNorm], images: Iterable[Tensor]) -> None:
    """Replace running means and variances by the plain average over batches (N, C, H, W); leaves the model in eval.

    Batches of one image tell no variance and are passed over.
    """
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain average
        layer.train()
    try:
        with torch.no_grad():
            for batch in images:
                if len(batch) > 1:
                    model(batch)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        model.eval()
