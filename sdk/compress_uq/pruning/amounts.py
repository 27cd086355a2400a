"""How many channels go from each group: from a sparsity, a dictionary, a global order, or a target."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from compress_uq.errors import PruningError, UnknownNameError
from compress_uq.pruning.graph.groups import Group

__all__ = [
    "Amount",
    "Removals",
    "Target",
    "check_amount",
    "kept_channels",
    "matches",
    "parse_sparsity",
    "removal_order",
    "sparsity_counts",
]

LARGEST_SHARE = 0.9
"""Of a layer's channels, at most this share goes when a global order or a target decides."""
QUANTITIES = ("macs", "params", "latency")

Amount = float | Mapping[str, float]
"""One sparsity for every layer, or a sparsity for each pattern of layer names; layers that match none stay whole."""


@dataclass(frozen=True)
class Target:
    """A share of the dense model's cost that may be kept."""

    quantity: str
    """`macs`, `params` or `latency`."""
    share: float

    def __post_init__(self) -> None:
        if self.quantity not in QUANTITIES:
            raise UnknownNameError("target", self.quantity, QUANTITIES)
        if not (math.isfinite(self.share) and 0 < self.share < 1):
            raise PruningError(f"target {self}: expected a share above 0 and below 1, such as {self.quantity}=0.5")

    def __str__(self) -> str:
        return f"{self.quantity}={self.share:g}"

    @classmethod
    def parse(cls, text: str) -> Target:
        """From `macs=0.5`, `params=0.4` or `latency=0.5`.

        Raises:
            PruningError: another form, or a share that cannot be.
        """
        quantity, _, number = text.partition("=")
        try:
            share = float(number)
        except ValueError as error:
            raise PruningError(f"target {text!r}: expected macs=SHARE, params=SHARE or latency=SHARE") from error
        return cls(quantity.strip(), share)


def parse_sparsity(text: str) -> Amount:
    """From `0.6`, or from `PATTERN=0.6,PATTERN=0.3`.

    Raises:
        PruningError: neither.
    """
    try:
        if "=" not in text:
            return float(text)
        pairs = [(pattern.strip(), float(value)) for pattern, _, value in (p.partition("=") for p in text.split(","))]
    except ValueError as error:
        raise PruningError(f"sparsity {text!r}: expected a number such as 0.6, or PATTERN=NUMBER,...") from error
    found = dict(pairs)
    if len(found) < len(pairs):
        raise PruningError(f"sparsity {text!r}: a pattern is there twice")
    return found


def kept_channels(channels: int, sparsity: float, round_to: int) -> int:
    """How many of a layer's channels stay: C - int(C s + 1e-9), to the nearest multiple of `round_to`, ties up.

    Never fewer than `round_to`, never more than there are (Holzbock, equation 1, for `round_to=1`).
    """
    return _rounded(channels, channels - int(channels * sparsity + 1e-9), round_to)


def matches(group: Group, pattern: str) -> bool:
    """Whether a layer whose outputs are the group's channels has this name, lies below it, or is of this type.

    `layer1`, `layer*.conv2` and `Conv2d` are patterns.
    """
    return any(
        fnmatchcase(layer.name, pattern)
        or layer.name.startswith(f"{pattern}.")
        or type(layer.module).__name__ == pattern
        for layer in group.layers
        if layer.side == "out"
    )


def check_amount(sparsity: Amount) -> None:
    """See that a sparsity can be.

    Raises:
        PruningError: not a share, or a dictionary that removes nothing.
    """
    if not isinstance(sparsity, Mapping):
        _check_share("sparsity", sparsity)
        return
    for pattern, value in sparsity.items():
        _check_share(f"sparsity of {pattern!r}", value, lowest_allowed=True)
    if not any(sparsity.values()):
        raise PruningError(f"sparsity={dict(sparsity)} removes nothing: expected a share above 0 for some pattern")


def sparsity_counts(groups: Sequence[Group], sparsity: Amount, round_to: int) -> list[int]:
    """Channels to remove from each group.

    Raises:
        PruningError: a sparsity that cannot be, or a pattern that no layer matches.
    """
    check_amount(sparsity)
    if isinstance(sparsity, Mapping):
        for pattern in sparsity:
            if not any(matches(group, pattern) for group in groups):
                raise PruningError(
                    f"sparsity of {pattern!r}: no prunable layer matches; they are "
                    f"{', '.join(group.name for group in groups)}"
                )
        shares = [next((v for pattern, v in sparsity.items() if matches(group, pattern)), 0.0) for group in groups]
    else:
        shares = [sparsity] * len(groups)
    return [
        _whole(group, group.channels - kept_channels(group.channels, share, round_to)) if share else 0
        for group, share in zip(groups, shares, strict=True)
    ]


@dataclass(frozen=True)
class Removals:
    """Channels in the order in which they would go, one group's index for each; any prefix is a reachable size."""

    groups: tuple[Group, ...]
    order: tuple[int, ...]
    round_to: int

    def counts(self, length: int) -> list[int]:
        """Channels to remove from each group after the first `length` removals, rounded; grows with `length`."""
        taken = torch.bincount(torch.tensor(self.order[:length], dtype=torch.long), minlength=len(self.groups)).tolist()
        return [
            _whole(group, group.channels - _rounded(group.channels, group.channels - count, self.round_to))
            for group, count in zip(self.groups, taken, strict=True)
        ]

    def share(self, sparsity: float) -> list[int]:
        """Channels to remove from each group when a share of all of them goes.

        Raises:
            PruningError: not a share, or more than the layers' caps allow.
        """
        _check_share("sparsity", sparsity)
        length = int(sum(group.channels for group in self.groups) * sparsity + 1e-9)
        if length > len(self.order):
            raise PruningError(
                f"sparsity={sparsity} with scope global: at most {LARGEST_SHARE} of a layer's channels go, "
                f"{len(self.order)} in all; ask for less"
            )
        return self.counts(length)

    def shortest(self, holds: Callable[[list[int]], bool]) -> int:
        """The shortest prefix for which a growing condition holds; one more than all where none does."""
        low, high = 0, len(self.order) + 1
        while low < high:
            middle = (low + high) // 2
            if holds(self.counts(middle)):
                high = middle
            else:
                low = middle + 1
        return low


def removal_order(groups: Sequence[Group], scores: Sequence[Tensor] | None, round_to: int) -> Removals:
    """The order of removals: every layer at the same pace, or, with scores (channels,), the lowest of all layers first.

    No layer loses more than 0.9 of its channels, so that none is emptied and the size never rises with the ratio.
    """
    events: list[tuple[float, int]] = []
    for index, group in enumerate(groups):
        most = int(group.channels * LARGEST_SHARE + 1e-9)
        if scores is None:
            events += [((k + 1) / group.channels, index) for k in range(most)]
        else:
            events += [(float(value), index) for value in scores[index].sort().values[:most]]
    return Removals(tuple(groups), tuple(index for _, index in sorted(events)), round_to)


def _rounded(channels: int, kept: int, round_to: int) -> int:
    rounded = math.floor(kept / round_to + 0.5) * round_to
    return min(channels, max(round_to, rounded))


def _whole(group: Group, count: int) -> int:
    """Each part of a grouped convolution loses as many."""
    return count // group.divisions * group.divisions


def _check_share(name: str, value: float, *, lowest_allowed: bool = False) -> None:
    if not (math.isfinite(value) and (0 < value < 1 or (lowest_allowed and value == 0))):
        raise PruningError(f"{name}={value}: expected a share above 0 and below 1, such as 0.6")
