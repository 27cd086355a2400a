"""Layers with weights of their own for every group of images, in one product: dropped connections (Wan 2013)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["grouped_layer"]


def grouped_layer(layer: nn.Module, inputs: Tensor, weights: Tensor) -> Tensor:
    """What a linear or convolutional layer returns when the images come in groups, each with its own weights.

    One batched product, or one convolution with as many more groups; no loop.

    Args:
        layer: tells bias, stride and the rest; its own weight is not used.
        inputs: (G * N, ...), group by group.
        weights: (G, *layer.weight.shape).
    """
    if isinstance(layer, nn.Conv2d):
        return _convolution(layer, inputs, weights)
    groups = len(weights)
    rows = inputs.unflatten(0, (groups, -1))
    products = torch.matmul(rows.flatten(1, -2), weights.transpose(1, 2))
    outputs: Tensor = products.reshape(*inputs.shape[:-1], weights.shape[1])
    bias = layer.bias
    return outputs if not isinstance(bias, Tensor) else outputs.add(bias)


def _convolution(layer: nn.Conv2d, inputs: Tensor, weights: Tensor) -> Tensor:
    groups = len(weights)
    side_by_side = inputs.unflatten(0, (groups, -1)).transpose(0, 1).flatten(1, 2)
    bias = None if layer.bias is None else layer.bias.repeat(groups)
    outputs = F.conv2d(
        side_by_side, weights.flatten(0, 1), bias, layer.stride, layer.padding, layer.dilation, groups * layer.groups
    )
    by_group: Tensor = outputs.unflatten(1, (groups, -1))
    return by_group.transpose(0, 1).flatten(0, 1)
