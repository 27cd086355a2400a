"""What one forward pass of a network shows: which modules run once, in which order, with which shapes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress_uq.cost import evaluation_mode

__all__ = ["Trace", "is_leaf", "is_weighted", "trace"]


@dataclass(frozen=True)
class Trace:
    """Output shapes, without the batch axis, and order of the modules that ran exactly once."""

    shapes: dict[str, tuple[int, ...]]
    order: dict[str, int]


def trace(model: nn.Module, example: Tensor) -> Trace:
    """Run the model on images (N, C, H, W) in eval and note what its modules return."""
    shapes: dict[str, tuple[int, ...]] = {}
    order: dict[str, int] = {}
    runs: Counter[str] = Counter()
    handles = []
    for name, module in model.named_modules():
        if not name:
            continue

        def note(_module: nn.Module, _inputs: Any, output: Any, name: str = name) -> None:
            runs[name] += 1
            if isinstance(output, Tensor):
                shapes[name] = tuple(output.shape[1:])
                order[name] = len(order)

        handles.append(module.register_forward_hook(note))
    try:
        with evaluation_mode(model), torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    once = {name for name in order if runs[name] == 1}
    return Trace({n: s for n, s in shapes.items() if n in once}, {n: i for n, i in order.items() if n in once})


def is_weighted(module: nn.Module) -> bool:
    """True where the module, or one inside it, has a weight matrix."""
    return any(p.ndim >= 2 for p in module.parameters())


def is_leaf(module: nn.Module) -> bool:
    """True for a module without modules inside."""
    return next(module.children(), None) is None
