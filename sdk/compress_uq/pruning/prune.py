"""Structured pruning: channels are taken out, and the model is smaller."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress_uq.cost import Cost, measure_cost
from compress_uq.errors import ModelError, PruningError
from compress_uq.models import as_logits
from compress_uq.pruning.graph import Group, dependency_groups
from compress_uq.pruning.l1 import l1
from compress_uq.registry import Entry, Registry
from compress_uq.stages import ModelOrResult, Origin, unpack

__all__ = ["CRITERIA", "Criterion", "PrunedLayer", "PruneResult", "kept_channels", "prune"]

Criterion = Callable[[Group], Tensor]
"""Maps a group to the importance (channels,) of its channels; the lowest are removed."""

CRITERIA: Registry[Criterion] = Registry(
    "criterion",
    Entry("l1", "L1 norm of a channel's filters", "Li 2017, section 3.1", l1),
)


@dataclass(frozen=True)
class PrunedLayer:
    """One group of channels before and after."""

    name: str
    before: int
    after: int
    removed: tuple[int, ...]
    """The group's channels that are gone, as numbered before."""
    consumers: tuple[tuple[str, tuple[int, ...]], ...]
    """Layers that used them, and their input positions that are gone."""


@dataclass(frozen=True)
class PruneResult:
    """A pruned copy and what it cost before and after."""

    model: nn.Module
    before: Cost
    after: Cost
    layers: tuple[PrunedLayer, ...]
    origin: Origin

    @property
    def sparsity(self) -> float:
        """Share of the prunable channels that are gone."""
        total = sum(layer.before for layer in self.layers)
        return 1 - sum(layer.after for layer in self.layers) / total


def kept_channels(channels: int, sparsity: float, round_to: int) -> int:
    """How many of a layer's channels stay: C - int(C s + 1e-9), to the nearest multiple of `round_to`, ties up.

    Never fewer than `round_to`, never more than there are (Holzbock, equation 1, for `round_to=1`).
    """
    kept = channels - int(channels * sparsity + 1e-9)
    rounded = math.floor(kept / round_to + 0.5) * round_to
    return min(channels, max(round_to, rounded))


def prune(
    model: ModelOrResult,
    example_inputs: Tensor | None = None,
    *,
    sparsity: float,
    criterion: str | Criterion = "l1",
    round_to: int = 8,
) -> PruneResult:
    """Remove the least important channels of every layer of a copy; the classifier's outputs stay.

    Args:
        model: a classifier, or a stage's result.
        example_inputs: images (N, C, H, W) of the right shape; an earlier stage's result knows it.
        sparsity: s, above 0 and below 1: the share of channels removed from each layer.
        criterion: a name of `compress-uq methods`, or a function from a group to its channels' importance.
        round_to: channels kept are a multiple of this; 1 keeps exactly C - int(C s).

    Raises:
        PruningError: a sparsity that cannot be, a model that cannot be traced, or nothing that can be pruned.
        ModelError: the model's output is not logits.
    """
    if not (math.isfinite(sparsity) and 0 < sparsity < 1):
        raise PruningError(f"sparsity={sparsity}: expected a share above 0 and below 1, such as 0.6")
    if round_to < 1:
        raise PruningError(f"round_to={round_to}: expected 1 or more")
    score = CRITERIA[criterion] if isinstance(criterion, str) else criterion
    given, origin = unpack(model, example_inputs)
    example = origin.example(given, "prune")
    pruned = copy.deepcopy(given)
    flags = {name: (p.requires_grad, p.dtype) for name, p in pruned.named_parameters()}
    modes = {name: module.training for name, module in pruned.named_modules()}
    pruned.eval()
    _try(pruned, example)
    before = measure_cost(pruned, example.shape[1:])
    groups = dependency_groups(pruned, example)
    layers = [layer for group in groups if (layer := _shrink(group, score, sparsity, round_to)) is not None]
    if not any(layer.removed for layer in layers):
        raise PruningError(_nothing(groups, sparsity, round_to))
    for name, parameter in pruned.named_parameters():
        parameter.requires_grad_(flags[name][0])
        parameter.grad = None
    _try(pruned, example)
    after = measure_cost(pruned, example.shape[1:])
    for name, module in pruned.named_modules():
        module.training = modes[name]
    origin = Origin(tuple(example.shape[1:]), origin.dense_cost or before)
    return PruneResult(pruned, before, after, tuple(layers), origin)


def _shrink(group: Group, score: Criterion, sparsity: float, round_to: int) -> PrunedLayer:
    kept = kept_channels(group.channels, sparsity, round_to)
    count = group.channels - kept
    importance = score(group)
    if group.divisions > 1:
        # Each part of a grouped convolution loses the same places, chosen by their mean importance.
        count = count // group.divisions
        places = importance.view(group.divisions, -1).mean(0).argsort(stable=True)[:count]
        offsets = torch.arange(group.divisions) * (group.channels // group.divisions)
        chosen = (places.unsqueeze(0) + offsets.unsqueeze(1)).flatten()
    else:
        chosen = importance.argsort(stable=True)[:count]
    removed = sorted(chosen.tolist())
    gone = torch.zeros(group.channels, dtype=torch.bool)
    gone[removed] = True
    consumers = tuple(
        (layer.name, tuple(sorted(layer.indices[gone[layer.channels]].tolist())))
        for layer in group.layers
        if layer.side == "in"
    )
    if removed:
        group.remove(removed)
    return PrunedLayer(group.name, group.channels, group.channels - len(removed), tuple(removed), consumers)


def _nothing(groups: list[Group], sparsity: float, round_to: int) -> str:
    if not groups:
        return "nothing can be pruned: no layer but the classifier has channels to lose, or all of them are frozen"
    widest = max(group.channels for group in groups)
    return (
        f"nothing was pruned: sparsity {sparsity} with round_to {round_to} keeps every channel of layers up to "
        f"{widest} wide; raise --sparsity or pass --round-to 1"
    )


def _try(model: nn.Module, example: Tensor) -> None:
    """One forward pass, its failure told in one line."""
    try:
        with torch.no_grad():
            as_logits(model(example))
    except ModelError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"the model does not run on images of shape {tuple(example.shape[1:])}: {reason}") from error
