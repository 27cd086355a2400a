"""Meeting a target: the nearest reachable size at or below a share of the dense model's cost."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compress_uq.cost import Cost, evaluation_mode, interleaved_milliseconds, measure_cost
from compress_uq.errors import PruningError
from compress_uq.pruning.amounts import Removals, Target
from compress_uq.pruning.criteria.criterion import least_important
from compress_uq.pruning.graph.groups import dependency_groups
from compress_uq.pruning.ledger import Ledger

__all__ = ["TargetReached", "meet_target"]

LATENCY_TOLERANCE = 0.1


@dataclass(frozen=True)
class TargetReached:
    """What was asked for, and the nearest that could be reached at or below it."""

    target: Target
    reached: float
    """Share of the dense model's cost."""

    def measured(self, before: Cost, after: Cost) -> TargetReached:
        """The same with the share counted on the model that was made; a latency stays as it was measured."""
        if self.target.quantity == "latency":
            return self
        counts = (after.macs, before.macs) if self.target.quantity == "macs" else (after.parameters, before.parameters)
        return replace(self, reached=counts[0] / counts[1])


def meet_target(
    target: Target, model: nn.Module, example: Tensor, removals: Removals, before: Cost
) -> tuple[list[int], TargetReached]:
    """Channels to remove from each group, and the share that is then kept; the model is not changed.

    MACs and parameters are counted on a pruned copy; a latency is the median time of one image on the model's device,
    taken in turns with the dense model's.

    Raises:
        PruningError: not even the smallest reachable size meets the target; tells its share.
    """
    if target.quantity == "latency":
        return _meet_latency(target, model, example, removals)
    ledger = Ledger(model, example, removals.groups, before.macs, before.parameters)
    estimate, whole = (
        (ledger.macs, before.macs) if target.quantity == "macs" else (ledger.parameters, before.parameters)
    )

    def share(length: int) -> float:
        cost = measure_cost(_outline(model, example, removals, removals.counts(length)), example.shape[1:])
        return (cost.macs if target.quantity == "macs" else cost.parameters) / whole

    # The ledger's answer is exact where convolutions and linear layers are all there is; the copy corrects it.
    goal = target.share
    length = removals.shortest(lambda counts: estimate(counts) <= goal * whole)
    longest = len(removals.order)
    reached = share(min(length, longest))
    if reached > target.share:
        length = _first(lambda n: share(n) <= target.share, length, longest)
        if length > longest:
            raise PruningError(_unreachable(target, share(longest), removals))
        reached = share(length)
    elif length and share(length - 1) <= target.share:
        length = _first(lambda n: share(n) <= target.share, 0, length - 1)
        reached = share(length)
    return removals.counts(length), TargetReached(target, reached)


def _meet_latency(
    target: Target, model: nn.Module, example: Tensor, removals: Removals
) -> tuple[list[int], TargetReached]:
    shares: dict[int, float] = {}

    def share(length: int) -> float:
        if length not in shares:
            shares[length] = _relative_time(model, _outline(model, example, removals, removals.counts(length)), example)
        return shares[length]

    low, high = 0, len(removals.order)
    if share(high) > target.share * (1 + LATENCY_TOLERANCE):
        raise PruningError(_unreachable(target, share(high), removals))
    while high - low > max(1, len(removals.order) // 100):
        middle = (low + high) // 2
        if share(middle) <= target.share:
            high = middle
        else:
            low = middle
        if target.share * (1 - LATENCY_TOLERANCE / 2) <= share(high) <= target.share:
            break
    return removals.counts(high), TargetReached(target, share(high))


def _relative_time(dense: nn.Module, pruned: nn.Module, example: Tensor) -> float:
    def run(model: nn.Module) -> Callable[[], None]:
        def once() -> None:
            model(example)
            if example.device.type == "cuda":
                torch.cuda.synchronize(example.device)

        return once

    with evaluation_mode(dense), evaluation_mode(pruned), torch.no_grad():
        times = interleaved_milliseconds({"dense": run(dense), "pruned": run(pruned)}, rounds=25, seconds=4.0)
    return times["pruned"] / times["dense"]


def _outline(model: nn.Module, example: Tensor, removals: Removals, counts: Sequence[int]) -> nn.Module:
    """A copy of the right size; which channels go does not matter for its cost."""
    small = copy.deepcopy(model)
    wanted = {group.name: count for group, count in zip(removals.groups, counts, strict=True)}
    for group in dependency_groups(small, example):
        if wanted.get(group.name):
            group.remove(least_important("order", group, torch.arange(group.channels).double(), wanted[group.name]))
    return small


def _first(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The first length in low..high for which a growing condition holds; high + 1 where none does."""
    high += 1
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _unreachable(target: Target, smallest: float, removals: Removals) -> str:
    return (
        f"target {target} cannot be met: the smallest reachable with round_to {removals.round_to} is "
        f"{target.quantity}={smallest:.3f}; ask for that much, pass --round-to 1, or keep fewer layers"
    )
