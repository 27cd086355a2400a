"""Ranks of feature maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from compress_uq.errors import PruningError
from compress_uq.pruning.criteria.criterion import Evidence
from compress_uq.pruning.criteria.measured import Measured
from compress_uq.pruning.criteria.ranks import matrix_ranks

__all__ = ["HRank"]

_NORMS = frozenset(
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training _batch_norm_with_update "
    "cudnn_batch_norm miopen_batch_norm native_layer_norm native_group_norm".split()
)
_ACTIVATIONS = frozenset(
    "relu hardtanh clamp leaky_relu elu gelu silu mish hardswish sigmoid hardsigmoid tanh softplus "
    "_prelu_kernel".split()
)
_STEPS = _NORMS | _ACTIVATIONS | {"add", "cat"}


@dataclass(frozen=True)
class HRank(Measured):
    """The average rank of the feature maps that a layer's filters make (Lin et al. 2020, section 3).

    A map is taken where the authors' code takes it: after the norm, the residual sum and the activation that follow
    the layer, also those that follow a concatenation, and before pooling or anything else. A single value, as a linear
    layer makes, has rank 1 unless it is 0: the score is the share of images that the unit is active on. Small maps tie
    often, and maps that no activation makes sparse mostly have full rank: scores that are all equal are refused when
    channels are chosen.
    """

    name: ClassVar[str] = "hrank"
    normalised: ClassVar[bool] = True

    @torch.no_grad()
    def measure(self, layers: Mapping[str, nn.Module], evidence: Evidence) -> Mapping[str, Tensor]:
        """(out_channels,) float64 of each layer that runs as a module."""
        totals: dict[str, Tensor] = {}
        counts = dict.fromkeys(layers, 0)

        def finish(name: str, maps: Tensor) -> None:
            ranks = _ranks(name, _channels_first(layers[name], maps))
            totals[name] = totals.get(name, torch.zeros(())) + ranks.sum(0, dtype=torch.float64)
            counts[name] += len(ranks)

        for images, _ in self.batches(evidence):
            with _FeatureMaps(layers, finish):
                evidence.model(images)
        return {name: total / counts[name] for name, total in totals.items()}


def _channels_first(layer: nn.Module, maps: Tensor) -> Tensor:
    """(N, C, H, W) from a convolution's or linear layer's output with any number of dimensions."""
    if isinstance(layer, nn.Linear):
        maps = maps.movedim(-1, 1)
    while maps.ndim < 4:
        maps = maps.unsqueeze(-1)
    return maps.flatten(2, -2)


def _ranks(name: str, maps: Tensor) -> Tensor:
    """Ranks (N, C) int64 of maps (N, C, H, W), on the CPU."""
    maps = maps.cpu().to(torch.promote_types(maps.dtype, torch.float32))
    if not bool(torch.isfinite(maps.sum())):
        raise PruningError(f"criterion 'hrank': the feature maps of {name} are not finite; check weights and images")
    return matrix_ranks(maps.flatten(0, 1)).view(maps.shape[:2])


@dataclass(frozen=True)
class _Part:
    """Where a layer's channels lie in a tensor."""

    name: str
    axis: int
    start: int
    width: int

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.narrow(self.axis, self.start, self.width)


class _FeatureMaps(TorchDispatchMode):
    """Follows layers' outputs through norm, sum, concatenation and activation, and hands each on when it is final."""

    def __init__(self, layers: Mapping[str, nn.Module], finish: Callable[[str, Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._layers, self._finish = layers, finish
        # By identity; the tensor is held, so that no other can take its id.
        self._followed: dict[int, tuple[Tensor, list[_Part]]] = {}

    def __enter__(self) -> _FeatureMaps:
        self._hooks = [layer.register_forward_hook(partial(self._made, name)) for name, layer in self._layers.items()]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()
        if error[0] is None:
            for maps, parts in self._followed.values():
                self._end(maps, parts)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator; what is followed moves from its inputs to its output, or ends before it."""
        step = func.overloadpacket.__name__.removesuffix("_")
        used = [self._followed.pop(id(a)) for a in _tensors(args) if id(a) in self._followed]
        moved = [] if step not in _STEPS else _concatenated(args, used) if step == "cat" else used
        for maps, parts in used:
            if all(maps is not tensor for tensor, _ in moved):
                self._end(maps, parts)
        result = func(*args, **(kwargs or {}))
        output = result[0] if isinstance(result, tuple | list) else result
        for maps, parts in moved:
            if step != "cat" and output.shape != maps.shape:
                self._end(maps, parts)
            elif step in _ACTIVATIONS:
                self._end(output, parts)
            else:
                self._follow(output, parts)
        return result

    def _made(self, name: str, layer: nn.Module, _inputs: Any, output: Tensor) -> None:
        axis = output.ndim - 1 if isinstance(layer, nn.Linear) else 1
        self._follow(output, [_Part(name, axis, 0, output.shape[axis])])

    def _follow(self, tensor: Tensor, parts: list[_Part]) -> None:
        self._followed.setdefault(id(tensor), (tensor, []))[1].extend(parts)

    def _end(self, maps: Tensor, parts: list[_Part]) -> None:
        for part in parts:
            self._finish(part.name, part.of(maps))


def _tensors(args: Any) -> list[Tensor]:
    """The tensors among an operator's arguments, those in lists included."""
    found = []
    for argument in args:
        found += [a for a in (argument if isinstance(argument, list | tuple) else [argument]) if isinstance(a, Tensor)]
    return found


def _concatenated(args: Any, used: list[tuple[Tensor, list[_Part]]]) -> list[tuple[Tensor, list[_Part]]]:
    """What lies side by side along its channels after a concatenation, and where."""
    tensors, axis = args[0], args[1] if len(args) > 1 else 0
    starts, start = {}, 0
    for tensor in tensors:
        starts[id(tensor)] = start
        start += tensor.shape[axis]
    moved = []
    for maps, parts in used:
        if all(part.axis == axis % maps.ndim for part in parts):
            moved.append((maps, [replace(part, start=part.start + starts[id(maps)]) for part in parts]))
    return moved
