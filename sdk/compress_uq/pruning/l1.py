"""L1 norm of filters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress_uq.pruning.graph import Group

__all__ = ["l1"]


def l1(group: Group) -> Tensor:
    """Importance (channels,) float64 of a group's channels: the L1 norm of their filters (Li et al. 2017, section 3.1).

    In a group of several layers each layer's norms are divided by their mean, and the layers averaged, so that a wide
    layer counts no more than a narrow one.
    """
    total = torch.zeros(group.channels, dtype=torch.float64)
    layers = 0
    for layer in group.layers:
        if layer.side != "out" or not isinstance(layer.module, nn.modules.conv._ConvNd | nn.Linear):
            continue
        weight = layer.module.weight.detach().double().cpu()
        if isinstance(layer.module, nn.modules.conv._ConvTransposeNd):
            weight = weight.transpose(0, 1)
        norms = weight.flatten(1).abs().sum(1)[layer.indices]
        total.index_add_(0, layer.channels, norms / norms.mean().clamp_min(1e-30))
        layers += 1
    return total / max(layers, 1)
