"""Layers that are sums over their inputs, less the part of some of them, without computing the layer again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["is_separable", "less"]


def is_separable(layer: nn.Module) -> bool:
    """Whether `less` knows the layer: a linear layer, or a convolution of one group."""
    return type(layer).forward in _FORMS and getattr(layer, "groups", 1) == 1


def less(layer: nn.Module, seen: Tensor, answer: Tensor, positions: Tensor) -> Tensor:
    """What the layer would answer were some of its inputs zero, from what it saw and answered; `vmap` maps it.

    Args:
        seen: (N, ...) the layer's input.
        answer: (N, ...) its output.
        positions: (P,) of the inputs.
    """
    found: Tensor = _Less.apply(seen, answer, positions, layer)
    return found


class _Less(torch.autograd.Function):
    """A layer's answer less the contribution of some input positions; of many choices of them under `vmap`."""

    @staticmethod
    def forward(seen: Tensor, answer: Tensor, positions: Tensor, layer: nn.Module) -> Tensor:
        return _FORMS[type(layer).forward](layer, seen, answer, positions.unsqueeze(0), False)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is kept: there is no backward pass."""

    @staticmethod
    def vmap(
        info: Any, dims: tuple[Any, ...], seen: Tensor, answer: Tensor, positions: Tensor, layer: nn.Module
    ) -> tuple[Tensor, int]:
        mapped = dims[0] is not None
        if mapped:
            seen, answer = seen.movedim(dims[0], 0), answer.movedim(dims[1], 0)
        return _FORMS[type(layer).forward](layer, seen, answer, positions, mapped), 0


def _linear(layer: Any, seen: Tensor, answer: Tensor, positions: Tensor, mapped: bool) -> Tensor:
    count = len(positions)
    weight = layer.weight.T[positions]
    if mapped:
        rows = seen.reshape(count, -1, seen.shape[-1])
        rows = rows.gather(2, positions.unsqueeze(1).expand(-1, rows.shape[1], -1))
        whole = answer.reshape(count, -1, answer.shape[-1])
        return torch.baddbmm(whole, rows, weight, alpha=-1).view(answer.shape)
    columns = seen.reshape(-1, seen.shape[-1]).T[positions]
    whole = answer.reshape(-1, answer.shape[-1]).T.expand(count, -1, -1)
    found = torch.baddbmm(whole, weight.transpose(1, 2), columns, alpha=-1)
    return found.transpose(1, 2).view(count, *answer.shape)


def _convolution(layer: Any, seen: Tensor, answer: Tensor, positions: Tensor, mapped: bool) -> Tensor:
    found = answer.new_empty(len(positions), *answer.shape[-layer.weight.ndim :])
    for place, chosen in enumerate(positions):
        part, whole = (seen[place], answer[place]) if mapped else (seen, answer)
        torch.sub(whole, layer._conv_forward(part[:, chosen], layer.weight[:, chosen], None), out=found[place])
    return found


_FORMS: dict[Any, Callable[[Any, Tensor, Tensor, Tensor, bool], Tensor]] = {
    nn.Linear.forward: _linear,
    nn.Conv1d.forward: _convolution,
    nn.Conv2d.forward: _convolution,
    nn.Conv3d.forward: _convolution,
}
"""From what a layer saw and answered, (N, ...) or, mapped, (K, N, ...), and positions (K, P), to (K, N, ...)."""
