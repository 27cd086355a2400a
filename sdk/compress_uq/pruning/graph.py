"""The door to torch-pruning: which channels of which layers have to go together, and their removal."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch_pruning.pruner import function

from compress_uq.errors import PruningError
from compress_uq.models import ChannelSelect, as_logits

__all__ = ["CoupledLayer", "Group", "dependency_groups"]

_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)


@dataclass(frozen=True)
class CoupledLayer:
    """One layer's share in a group."""

    name: str
    module: nn.Module
    side: str
    """`out`: its outputs are the group's channels; `in`: it consumes them."""
    indices: Tensor
    """(M,) positions along the layer's axis."""
    channels: Tensor
    """(M,) the group's channel at each position; a flattened map repeats a channel."""


@dataclass(frozen=True)
class Group:
    """Channels that can only be removed together, from every layer that makes or uses them."""

    name: str
    """The layer that stands for the group."""
    channels: int
    layers: tuple[CoupledLayer, ...]
    divisions: int
    """Channels fall into this many equal parts that must lose the same places: 1 but for grouped convolutions."""
    _remove: Callable[[list[int]], None]

    def remove(self, channels: Sequence[int]) -> None:
        """Take these channels out of every layer, in place; other groups of the same graph stay valid."""
        self._remove(sorted(channels))


class _ChannelSelectPruner(function.BasePruningFunc):  # type: ignore[misc]
    """Each side of a `ChannelSelect` belongs to the stream on that side."""

    TARGET_MODULES = ChannelSelect

    def prune_out_channels(self, layer: ChannelSelect, idxs: Sequence[int]) -> nn.Module:
        layer.remove_outputs(list(idxs))
        return layer

    def prune_in_channels(self, layer: ChannelSelect, idxs: Sequence[int]) -> nn.Module:
        layer.remove_inputs(list(idxs))
        return layer

    def get_out_channels(self, layer: ChannelSelect) -> int:
        return layer.out_channels

    def get_in_channels(self, layer: ChannelSelect) -> int:
        return layer.in_channels


def dependency_groups(model: nn.Module, example: Tensor) -> list[Group]:
    """All groups of a model but those that hold its classifier's outputs; the model is in eval mode afterwards.

    Raises:
        PruningError: the model cannot be traced, or every weight is frozen.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise PruningError(
            "nothing can be pruned: every parameter is frozen; set requires_grad on the layers that may lose channels"
        )
    graph = torch_pruning.DependencyGraph()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph.build_dependency(
                model,
                example_inputs=example,
                customized_pruners={ChannelSelect: _ChannelSelectPruner()},
                output_transform=as_logits,
            )
    except PruningError:
        raise
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError) as error:
        raise PruningError(
            f"the model cannot be traced on images of shape {tuple(example.shape[1:])}: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    heads = _classifiers(graph)
    names = {module: name for name, module in model.named_modules()}
    found = graph.get_all_groups(ignored_layers=heads, root_module_types=list(_WEIGHTED))
    return [_group(graph, item, names) for item in found if _trainable(item)]


def _classifiers(graph: Any) -> list[nn.Module]:
    """The weighted layers from which nothing weighted lies on the way to the output."""
    ends = [node for node in graph.module2node.values() if not node.outputs]
    heads: list[nn.Module] = []
    seen = set()
    while ends:
        node = ends.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node.module, _WEIGHTED):
            heads.append(node.module)
        else:
            ends.extend(node.inputs)
    if not heads:
        raise PruningError("no classifier was found: no convolution or linear layer leads to the output")
    return heads


def _trainable(items: Any) -> bool:
    """A group with a frozen parameter is left alone, as its owner asked."""
    modules = [dep.target.module for dep, _ in items]
    return all(p.requires_grad for m in modules if isinstance(m, nn.Module) for p in m.parameters(recurse=False))


def _group(graph: Any, items: Any, names: dict[nn.Module, str]) -> Group:
    layers = []
    divisions = 1
    for item in items:
        module = item.dep.target.module
        if module not in names:
            continue
        side = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
        both = isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.GroupNorm)
        layers.append(
            CoupledLayer(
                names[module],
                module,
                "out" if both else side,
                torch.as_tensor(item.idxs),
                torch.as_tensor(item.root_idxs),
            )
        )
        divisions = max(divisions, _divisions(module))
    root = items[0].dep.target.module
    handler = items[0].dep.handler
    channels = len(items[0].idxs)

    def remove(chosen: list[int]) -> None:
        graph.get_pruning_group(root, handler, chosen).prune(record_history=False)

    return Group(names[root], channels, tuple(layers), divisions, remove)


def _divisions(module: nn.Module) -> int:
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups not in (1, module.out_channels):
        return int(module.groups)
    if isinstance(module, nn.GroupNorm):
        return int(module.num_groups)
    return 1
