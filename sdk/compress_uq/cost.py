"""What a model costs: parameters, multiply-accumulates, bytes, milliseconds."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = [
    "Cost",
    "count_macs",
    "evaluation_mode",
    "interleaved_milliseconds",
    "interleaved_times",
    "measure_cost",
    "on_device",
]


@contextmanager
def on_device(model: nn.Module, device: torch.device | str) -> Iterator[nn.Module]:
    """The model on a device inside the block, and back where it was after it."""
    first = next(model.parameters(), None)
    home = torch.device("cpu") if first is None else first.device
    try:
        yield model.to(device)
    finally:
        model.to(home)


@dataclass(frozen=True)
class Cost:
    """Counts of a model, per image."""

    parameters: int
    macs: int
    """Multiply-accumulates of convolutions and matrix products in one forward pass of one image."""
    size_bytes: int
    """Bytes of parameters and buffers."""


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; every module's own mode is put back after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def count_macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of one forward pass, per image of the example batch.

    Attention takes its plain path while it is counted, since the fused one hides its products.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    counter = FlopCounterMode(display=False)
    try:
        with evaluation_mode(model), torch.no_grad(), counter:
            model(example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return int(counter.get_total_flops()) // (2 * len(example))


def measure_cost(model: nn.Module, input_shape: Sequence[int]) -> Cost:
    """Parameters, MACs and bytes of a model for images of `input_shape` (C, H, W)."""
    first = next(model.parameters(), None)
    device = "cpu" if first is None else first.device
    dtype = torch.float32 if first is None else first.dtype
    example = torch.zeros(1, *input_shape, device=device, dtype=dtype)
    tensors = [*model.parameters(), *model.buffers()]
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()),
        macs=count_macs(model, example),
        size_bytes=sum(t.numel() * t.element_size() for t in tensors),
    )


def interleaved_milliseconds(
    runs: dict[str, Callable[[], object]], *, rounds: int = 15, seconds: float = 6.0
) -> dict[str, float]:
    """Median time of each alternative, taken in turns so that a slow moment of the machine falls on all of them.

    Stops after `rounds` rounds, or after three once `seconds` have passed.
    """
    times = interleaved_times(runs, rounds=rounds, seconds=seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def interleaved_times(
    runs: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    seconds: float = math.inf,
    sparse: Mapping[str, int] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Milliseconds of every round of each alternative, in turns, after one round that does not count.

    Args:
        runs: by name.
        rounds: how many at most; after three, none begins once `seconds` have passed.
        sparse: alternatives that run in every k-th round only, by name; NaN where they did not.
        clock: tells seconds; `time.thread_time` counts the work of this thread alone.
    """
    every = sparse or {}
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - start > seconds:
            break
        for name, run in runs.items():
            if done % every.get(name, 1):
                times[name].append(math.nan)
                continue
            begin = clock()
            run()
            times[name].append(1000 * (clock() - begin))
    return times
