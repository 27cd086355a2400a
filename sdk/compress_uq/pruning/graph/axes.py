"""The axes of single layers: how long they are, how they are divided, and how positions are taken out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch_pruning
from torch import nn
from torch_pruning.pruner import function

from compress_uq.models import ChannelSelect

__all__ = ["axis_size", "divisions", "surgery"]


def axis_size(module: nn.Module, side: str) -> int | None:
    """How many channels a layer has on one side; None where it cannot lose any."""
    for kind, size in _AXES:
        if isinstance(module, kind):
            return size(module, side)
    return None


def _conv_axis(conv: Any, side: str) -> int | None:
    if conv.transposed and conv.groups > 1:
        return None
    return int(conv.out_channels if side == "out" else conv.in_channels)


_AXES: tuple[tuple[Any, Callable[[Any, str], int | None]], ...] = (
    (nn.modules.conv._ConvNd, _conv_axis),
    (nn.Linear, lambda m, side: m.out_features if side == "out" else m.in_features),
    (nn.modules.batchnorm._NormBase, lambda m, _: m.num_features),
    (nn.LayerNorm, lambda m, _: m.normalized_shape[0] if len(m.normalized_shape) == 1 else None),
    (nn.GroupNorm, lambda m, _: m.num_channels),
    (nn.PReLU, lambda m, _: m.num_parameters),
    (nn.Embedding, lambda m, _: m.embedding_dim),
    (nn.MultiheadAttention, lambda m, _: m.embed_dim),
    (ChannelSelect, lambda m, side: m.out_channels if side == "out" else m.in_channels),
)


def surgery(graph: Any, module: nn.Module, side: str) -> Callable[[list[int]], object]:
    """What takes positions, as they are numbered when it is called, out of a layer's outputs or inputs."""
    kind = torch_pruning.ops.module2type(module)
    pruner = graph.CUSTOMIZED_PRUNERS[ChannelSelect] if isinstance(module, ChannelSelect) else function.PrunerBox[kind]
    handler = pruner.prune_out_channels if side == "out" else pruner.prune_in_channels

    def prune(positions: list[int]) -> object:
        pruner.pruning_dim = -1
        return handler(module, positions)

    return prune


def divisions(module: nn.Module) -> int:
    """Equal parts of a layer's channels that must lose the same places."""
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups not in (1, module.out_channels):
        return int(module.groups)
    if isinstance(module, nn.GroupNorm):
        return int(module.num_groups)
    return 1
