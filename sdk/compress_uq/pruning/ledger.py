"""What a model would cost with fewer channels, without pruning it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress_uq.pruning.graph import Group

__all__ = ["Ledger"]


class Ledger:
    """What a model would cost with fewer channels, from its layers' shapes; what no layer explains stays as it is."""

    def __init__(self, model: nn.Module, example: Tensor, groups: Sequence[Group], macs: int, parameters: int) -> None:
        names = {module: name for name, module in model.named_modules()}
        self._outputs = _positions(groups, names, "out")
        self._inputs = _positions(groups, names, "in")
        self._layers = _calls(model, example)
        self._sizes = {
            names[m]: sum(p.numel() for p in m.parameters(recurse=False)) for m in names if names[m] in self._outputs
        }
        self._macs = macs - sum(layer.calls * layer.weights for layer in self._layers.values())
        self._parameters = parameters
        self._names = names

    def macs(self, counts: Sequence[int]) -> float:
        """Multiply-accumulates per image after removing `counts` channels from each group."""
        return self._macs + sum(
            layer.calls * layer.weights * self._out(name, counts) * self._in(name, layer, counts)
            for name, layer in self._layers.items()
        )

    def parameters(self, counts: Sequence[int]) -> float:
        """Parameters after removing `counts` channels from each group."""
        lost = 0.0
        for name, layer in self._layers.items():
            kept = self._out(name, counts)
            lost += layer.weights * (1 - kept * self._in(name, layer, counts)) + layer.biases * (1 - kept)
        for name, size in self._sizes.items():
            if name not in self._layers:
                lost += size * (1 - self._out(name, counts))
        return self._parameters - lost

    def _out(self, name: str, counts: Sequence[int]) -> float:
        return _share_kept(self._outputs.get(name), counts)

    def _in(self, name: str, layer: _Layer, counts: Sequence[int]) -> float:
        return 1.0 if layer.depthwise else _share_kept(self._inputs.get(name), counts)


@dataclass
class _Layer:
    weights: int
    biases: int
    depthwise: bool
    calls: int = 0
    """Output positions per image, over all calls."""


@dataclass
class _Axis:
    size: int
    shares: list[tuple[int, float]]
    """(group, positions of this axis for each of its channels)."""


def _positions(groups: Sequence[Group], names: Mapping[nn.Module, str], side: str) -> dict[str, _Axis]:
    axes: dict[str, _Axis] = {}
    for index, group in enumerate(groups):
        for layer in group.layers:
            if layer.side == side:
                axis = axes.setdefault(layer.name, _Axis(_axis_size(layer.module, side), []))
                axis.shares.append((index, len(layer.indices) / group.channels))
    return axes


def _axis_size(module: nn.Module, side: str) -> int:
    """Length of a layer's axis of outputs or inputs; of a norm, its channels."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.out_channels if side == "out" else module.in_channels
    if isinstance(module, nn.Linear):
        return module.out_features if side == "out" else module.in_features
    weight = getattr(module, "weight", None)
    return weight.shape[-1] if isinstance(weight, Tensor) and weight.ndim else 1


def _share_kept(axis: _Axis | None, counts: Sequence[int]) -> float:
    if axis is None:
        return 1.0
    return max(0.0, 1 - sum(counts[group] * share for group, share in axis.shares) / axis.size)


def _calls(model: nn.Module, example: Tensor) -> dict[str, _Layer]:
    """Weighted layers and how many output positions each computes for one image."""
    layers: dict[str, _Layer] = {}
    hooks = []

    def count(name: str, channels: int) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            layers[name].calls += output.numel() // (channels * len(example))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            channels = _axis_size(module, "out")
            depthwise = isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.in_channels > 1
            biases = 0 if module.bias is None else module.bias.numel()
            layers[name] = _Layer(module.weight.numel(), biases, depthwise)
            hooks.append(module.register_forward_hook(count(name, channels)))
    try:
        with torch.no_grad():
            model(example)
    finally:
        for handle in hooks:
            handle.remove()
    return layers
