"""Folding a linear map of a layer's outputs into the layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["mix", "mix_normed", "own_norms", "scale"]


def own_norms(model: nn.Module, example: Tensor) -> dict[nn.Module, nn.Module]:
    """Weighted layers whose output goes to one batch norm, that reads nothing else, and the batch norm."""
    sources: dict[int, nn.Module] = {}
    outputs: list[Tensor] = []  # held, so that no two have the same id
    fed: dict[nn.Module, set[nn.Module | None]] = {}

    def left(layer: nn.Module, _inputs: object, output: Tensor) -> None:
        sources[id(output)] = layer
        outputs.append(output)

    def reached(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        fed.setdefault(norm, set()).add(sources.get(id(inputs[0])))

    handles = []
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            handles.append(module.register_forward_hook(left))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine and module.track_running_stats:
            handles.append(module.register_forward_pre_hook(reached))
    with torch.no_grad():
        model(example)
    for handle in handles:
        handle.remove()
    pairs = [(layers.copy().pop(), norm) for norm, layers in fed.items() if len(layers) == 1]
    layers = [layer for layer, _ in pairs]
    return {layer: norm for layer, norm in pairs if layer is not None and layers.count(layer) == 1}


def scale(layer: Any, factors: Tensor) -> None:
    """Multiply a layer's outputs by one factor each."""
    for parameter in (layer.weight, layer.bias):
        if parameter is not None:
            shape = (-1,) + (1,) * (parameter.ndim - 1)
            parameter.copy_(parameter.double() * factors.view(shape))


def mix(layer: Any, matrix: Tensor) -> None:
    """Multiply a weighted layer's outputs by a matrix."""
    pattern = "oc,ic...->io..." if getattr(layer, "transposed", False) else "oc,c...->o..."
    layer.weight.copy_(torch.einsum(pattern, matrix, layer.weight.double()))
    if layer.bias is not None:
        layer.bias.copy_(matrix @ layer.bias.double())


def mix_normed(layer: Any, norm: Any, matrix: Tensor, variance: Tensor) -> None:
    """Make layer and norm answer as they did with a matrix after the norm; the matrix goes into the layer."""
    scaled = matrix * (norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt())
    mix(layer, scaled)
    norm.running_mean.copy_(scaled @ norm.running_mean.double())
    norm.running_var.copy_(variance)
    norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt())
    norm.bias.copy_(matrix @ norm.bias.double())
