"""ResRep: compactors are trained to forget channels while the rest of the network remembers."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compress_uq.cost import measure_cost
from compress_uq.errors import InputError, PruningError, UnknownNameError
from compress_uq.models import ChannelSelect
from compress_uq.pruning.amounts import removal_order
from compress_uq.pruning.criteria.compactor import Compactors
from compress_uq.pruning.criteria.criterion import Criterion, Evidence
from compress_uq.pruning.graph.groups import Group, filters
from compress_uq.pruning.ledger import Ledger

__all__ = ["ResRep"]

_Amounts = Callable[[Sequence[Tensor], float], list[int]]
"""Channels to mask in each group, from its rows' norms and the share, from 0 to 1, of those that go."""

_LOG = logging.getLogger(__name__)
_TRAVEL = 1.5
"""How far the rows masked last are pushed in what is left of the run, in first lengths: enough to come to zero."""
_FEWEST_STEPS = 10
_FREEZE = 0.8
"""Share of the run after which the choice of channels stands."""
_VARIANCE_IMAGES = 1024


@dataclass(frozen=True)
class ResRep(Criterion):
    """ResRep (Ding et al. 2021): a compactor after each layer, gradient resetting, and a Euclidean penalty on its rows.

    Defaults are those of the source's code, those that are counts of steps as shares of the run, so that a short run
    ends pruned as well.
    """

    name: ClassVar[str] = "resrep"
    strength: float = 1e-4
    """Of the penalty; masked rows are pushed harder in runs too short for them to come to zero with this."""
    lr: float = 0.01
    """First learning rate of the compactors; it falls to 0 along a cosine."""
    momentum: float = 0.99
    """Of the compactors; less in runs too short for it."""
    warmup: float = 0.01
    """Share of the run before the first channel is masked."""
    growth: float = 0.4
    """Share of the run after which all channels that go are masked; their number grows linearly up to there."""
    interval: float = 0.002
    """Share of the run between two choices of channels."""
    share: float = 0.6
    """Of a run's epochs, those with compactors; the rest is fine-tuning, which begins with a high learning rate again.
    With 1 there is none, for methods that need no training of their own."""
    inner: bool = False
    """Only channels that one layer alone makes go, as in the source; those of residual streams stay."""
    budget: str = "layer"
    """What the amount asked for is understood as. `layer`: so many channels of each layer. `channels`: as many in all,
    the shortest rows of all layers. `macs`: the multiply-accumulates that would be left, also by the shortest rows of
    all layers, as in the source; here the layers that are pruned make up for those that are not."""

    def __post_init__(self) -> None:
        for name in ("strength", "lr"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name}={value}: expected above 0")
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum={self.momentum}: expected 0 or more, below 1")
        if not 0 <= self.warmup <= self.growth <= _FREEZE:
            raise InputError(f"warmup={self.warmup}, growth={self.growth}: expected 0 <= warmup <= growth <= {_FREEZE}")
        if not 0 < self.interval <= _FREEZE:
            raise InputError(f"interval={self.interval}: expected above 0, at most {_FREEZE}")
        if not 0 < self.share <= 1:
            raise InputError(f"share={self.share}: expected above 0, at most 1")
        if self.budget not in _BUDGETS:
            raise UnknownNameError("budget", self.budget, _BUDGETS)

    @property
    def trains(self) -> bool:
        """Always."""
        return True

    @property
    def training_share(self) -> float:
        """As configured."""
        return self.share

    def scores(self, groups: Sequence[Group], evidence: Evidence) -> list[Tensor]:
        """Has none.

        Raises:
            PruningError: always.
        """
        raise PruningError(f"criterion {self.name!r} has no scores: it chooses while it trains")

    def choose(self, groups: Sequence[Group], evidence: Evidence, counts: Sequence[int] | None) -> list[list[int]]:
        """Train the model until the channels that go are zero for all that read them; its structure is as it was.

        Raises:
            PruningError: no counts; nothing to remove; fewer than 10 steps; a layer in the way of exact removal.
        """
        if counts is None:
            raise PruningError(
                f"criterion {self.name!r} does not decide how many channels go: give a sparsity or target"
            )
        uneven = self.budget != "layer"
        places = [i for i, group in enumerate(groups) if (any(counts) if uneven else counts[i]) and self._takes(group)]
        if not places:
            only = " from layers that alone make theirs; pass inner=False" if self.inner else ""
            raise PruningError(f"criterion {self.name!r} has no channels to remove{only}")
        taken = [groups[i] for i in places]
        amounts = _BUDGETS[self.budget](groups, places, evidence, counts)
        compactors = Compactors(evidence.model, evidence.example, taken)

        def after_backward(step: int, steps: int) -> None:
            share = self._share(step, steps)
            if share is not None:
                norms = compactors.norms()
                now = amounts(norms, share)
                compactors.mask([_lowest(*each) for each in zip(taken, norms, now, strict=True)])
            momentum = min(self.momentum, 1 - 20 / max(steps, 20))
            lr = self.lr * (1 + math.cos(math.pi * step / steps)) / 2
            # A row that nothing holds moves by lr * push / (1 - momentum) per step.
            left = 1 - self.growth - math.sin(math.pi * self.growth) / math.pi
            push = max(self.strength, _TRAVEL * (1 - momentum) / (self.lr * steps / 2 * left))
            compactors.step(lr, momentum, self.strength, push, fade=1 / max(1, int(0.1 * steps)))

        evidence.train(self.name, after_backward)
        masks = compactors.masks()
        cut = [norm[mask] for norm, mask in zip(compactors.norms(), masks, strict=True)]
        _LOG.info("resrep: the longest row cut off had length %.3g, of 1 before training", torch.cat(cut).max())
        compactors.zero(masks)
        compactors.fold(evidence.model, (images for images, _ in evidence.images(self.name, _VARIANCE_IMAGES)))
        chosen: list[list[int]] = [[] for _ in groups]
        for place, mask in zip(places, masks, strict=True):
            chosen[place] = mask.nonzero().flatten().tolist()
        return chosen

    def _takes(self, group: Group) -> bool:
        makers = [layer.module for layer in group.layers if layer.side == "out"]
        mixing = [m for m in makers if filters(m) is not None and getattr(m, "groups", 1) == 1]
        return not self.inner or (len(mixing) == 1 and not any(isinstance(m, ChannelSelect) for m in makers))

    def _share(self, step: int, steps: int) -> float | None:
        """Of the channels that go, the share masked from this step on; None where the choice stands."""
        if steps < _FEWEST_STEPS:
            raise PruningError(
                f"criterion {self.name!r} needs {_FEWEST_STEPS} training steps or more, not {steps}: "
                "raise epochs, or lower batch_size"
            )
        first, full, last = max(1, int(self.warmup * steps)), int(self.growth * steps), int(_FREEZE * steps)
        every = max(1, round(self.interval * steps))
        if step < first or step > last or ((step - first) % every and step != last):
            return None
        return 1.0 if step >= full else (step - first + 1) / (full - first + 1)


def _same_layers(
    _groups: Sequence[Group], places: Sequence[int], _evidence: Evidence, counts: Sequence[int]
) -> _Amounts:
    return lambda _norms, share: [math.ceil(counts[place] * share) for place in places]


def _same_channels(
    groups: Sequence[Group], places: Sequence[int], _evidence: Evidence, counts: Sequence[int]
) -> _Amounts:
    taken, whole = [groups[i] for i in places], sum(counts[i] for i in places)
    return lambda norms, share: removal_order(taken, norms, 1).counts(math.ceil(whole * share))


def _same_macs(groups: Sequence[Group], places: Sequence[int], evidence: Evidence, counts: Sequence[int]) -> _Amounts:
    """MACs fall from the dense model's to those that `counts` of all groups would leave, by the groups at `places`."""
    cost = measure_cost(evidence.model, evidence.example.shape[1:])
    ledger = Ledger(evidence.model, evidence.example, groups, cost.macs, cost.parameters)
    dense, least = ledger.macs([0] * len(groups)), ledger.macs(counts)
    taken = [groups[i] for i in places]

    def macs(some: Sequence[int]) -> float:
        whole = [0] * len(groups)
        for place, count in zip(places, some, strict=True):
            whole[place] = count
        return ledger.macs(whole)

    def amounts(norms: Sequence[Tensor] | None, share: float) -> list[int]:
        order = removal_order(taken, norms, 1)
        return order.counts(order.shortest(lambda some: macs(some) <= dense - share * (dense - least)))

    if macs(amounts(None, 1.0)) > least:
        raise PruningError(
            f"resrep cannot reach {least / dense:.3f} of the MACs from the layers that it may prune, of each of which "
            "0.9 may go: ask for less, or pass inner=False"
        )
    return amounts


def _lowest(group: Group, norms: Tensor, count: int) -> Tensor:
    """(channels,) bool: the `count` lowest; each part of a grouped convolution has as many, at the same places."""
    places = norms.view(group.divisions, -1).mean(0).argsort(stable=True)[: count // group.divisions]
    mask = torch.zeros(group.divisions, group.channels // group.divisions, dtype=torch.bool)
    mask[:, places] = True
    return mask.flatten()


_BUDGETS = {"layer": _same_layers, "channels": _same_channels, "macs": _same_macs}
