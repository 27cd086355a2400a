"""What dropout can drop: channels, single activations, filters before their norm, or connections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from compress_uq.uq.traces import Trace, is_leaf

__all__ = ["KINDS", "LAYERS", "Kind", "own_shape"]

LAYERS = (nn.Linear, nn.Conv2d)
"""Layers whose filters and connections can be dropped."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Kind:
    """What is dropped, and where it is looked for."""

    mask: Callable[[nn.Module, str, Trace], Shape]
    """The shape of a mask at the module of that name."""
    at_layers: bool = False
    """True: every linear and convolutional layer is a site; False: a model's own dropout, else the ends of its blocks.
    """
    of_weights: bool = False
    """True: the mask is of a layer's weights; False: of one image's activations."""
    keeps_own: bool = False
    """True: a model's own dropout layers drop what they always did."""


def own_shape(module: nn.Module, output: Shape) -> Shape:
    """The mask of a model's own dropout layer."""
    if isinstance(module, nn.Dropout):
        return output
    return (output[0], *(1 for _ in output[1:]))


def _channels(module: nn.Module, name: str, traced: Trace) -> Shape:
    """Whole channels: the axis as long as the last layer inside is wide, the first of two."""
    output = traced.shapes[name]
    inside = [
        (traced.order[f"{name}.{n}" if n else name], m)
        for n, m in module.named_modules()
        if (f"{name}.{n}" if n else name) in traced.order and is_leaf(m) and any(True for _ in m.parameters())
    ]
    width = len(next(max(inside, key=lambda item: item[0])[1].parameters())) if inside else None
    channels_last = len(output) > 1 and output[0] != width and output[-1] == width
    if len(output) == 2:  # tokens (S, D): features come last
        channels_last = True
    if channels_last:
        return (*(1 for _ in output[:-1]), output[-1])
    return (output[0], *(1 for _ in output[1:]))


def _elements(_module: nn.Module, name: str, traced: Trace) -> Shape:
    return traced.shapes[name]


def _weights(module: nn.Module, _name: str, _traced: Trace) -> Shape:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return tuple(weight.shape)


KINDS = {
    "auto": Kind(_channels, keeps_own=True),
    "channel": Kind(_channels),
    "element": Kind(_elements),
    "filter": Kind(_channels, at_layers=True),
    "connection": Kind(_weights, at_layers=True, of_weights=True),
}
