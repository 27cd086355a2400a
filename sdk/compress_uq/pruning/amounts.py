"""How many channels go from each group: from a sparsity, a dictionary, a global order, or a target."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from compress_uq.errors import PruningError, UnknownNameError
from compress_uq.pruning.graph.groups import Group

__all__ = [
    "Amount",
    "Ledger",
    "Removals",
    "Target",
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
        pairs = [part.partition("=") for part in text.split(",")]
        return {pattern.strip(): float(value) for pattern, _, value in pairs}
    except ValueError as error:
        raise PruningError(f"sparsity {text!r}: expected a number such as 0.6, or PATTERN=NUMBER,...") from error


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


def sparsity_counts(groups: Sequence[Group], sparsity: Amount, round_to: int) -> list[int]:
    """Channels to remove from each group.

    Raises:
        PruningError: a sparsity that cannot be, or a pattern that no layer matches.
    """
    if isinstance(sparsity, Mapping):
        for pattern, value in sparsity.items():
            _check_share(f"sparsity of {pattern!r}", value, lowest_allowed=True)
            if not any(matches(group, pattern) for group in groups):
                raise PruningError(
                    f"sparsity of {pattern!r}: no prunable layer matches; they are "
                    f"{', '.join(group.name for group in groups)}"
                )
        shares = [next((v for pattern, v in sparsity.items() if matches(group, pattern)), 0.0) for group in groups]
    else:
        _check_share("sparsity", sparsity)
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


def _rounded(channels: int, kept: int, round_to: int) -> int:
    rounded = math.floor(kept / round_to + 0.5) * round_to
    return min(channels, max(round_to, rounded))


def _whole(group: Group, count: int) -> int:
    """Each part of a grouped convolution loses as many."""
    return count // group.divisions * group.divisions


def _check_share(name: str, value: float, *, lowest_allowed: bool = False) -> None:
    if not (math.isfinite(value) and (0 < value < 1 or (lowest_allowed and value == 0))):
        raise PruningError(f"{name}={value}: expected a share above 0 and below 1, such as 0.6")
