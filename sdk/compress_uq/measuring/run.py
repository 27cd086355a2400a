"""Timing a compressed model beside the dense one, in turns, in one process."""

from __future__ import annotations

import contextlib
import ctypes.util
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from compress_uq._version import __version__
from compress_uq.bundle import Bundle
from compress_uq.cost import interleaved_times
from compress_uq.data import Splits
from compress_uq.errors import GateError, InputError, MissingDependencyError, UnknownNameError
from compress_uq.export import MEMBER_LAYOUTS, PRECISIONS
from compress_uq.footprint import peak_of_file, random_inputs
from compress_uq.measuring.alternatives import (
    DENSE,
    EAGER,
    FLOOR,
    EagerLoop,
    File,
    compressed_files,
    dense_file,
    floor_files,
)
from compress_uq.measuring.result import Benchmark, Ratio, Timing
from compress_uq.progress import Progress, ProgressCallback, silent
from compress_uq.runtime import available_providers, session
from compress_uq.uncertain import UncertainModel

__all__ = ["benchmark"]

_PROVIDERS = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider"],
    "tensorrt": ["TensorrtExecutionProvider", "CUDAExecutionProvider"],
}
_CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.thread_time}
_EAGER_ROUNDS = 5
_NO_DENSE = (
    "the dense model is not at hand: its rows are left out; pass --dense FILE (dense=), or name the bundle's "
    "package.module:callable with --arch (arch=)"
)


@dataclass(frozen=True)
class _Plan:
    """What is timed, and how."""

    files: tuple[File, ...]
    loop: EagerLoop | None
    shape: tuple[int, ...]
    samples: int
    rounds: int
    clock: str
    memory: bool
    notes: list[str]


def benchmark(
    model: Bundle | UncertainModel,
    *,
    dense: nn.Module | None = None,
    arch: str | None = None,
    batch_sizes: Sequence[int] = (1, 32),
    threads: Sequence[int] = (1,),
    precisions: Sequence[str] = ("fp32",),
    layouts: Sequence[str] | None = None,
    quantization: str = "cpu",
    providers: Sequence[str] | None = None,
    splits: Splits | None = None,
    rounds: int = 30,
    clock: str = "wall",
    memory: bool = True,
    progress: ProgressCallback = silent,
) -> Benchmark:
    """Time a compressed model beside one pass of the dense one and beside T eager passes of it.

    All alternatives of one place and batch size are run in turns in one process, on random images, after one round that
    does not count; pools of threads do not spin. The eager loop runs in five of the rounds.

    Args:
        model: a bundle, or an uncertain model whose image shape is known.
        dense: what was compressed; by default a bundle's architecture with untrained weights, which cost as much.
        arch: names the bundle's own `package.module:callable` again.
        batch_sizes: images in one call.
        threads: inside one call.
        precisions: of the compressed model; `int8` needs `splits`.
        layouts: `fold`, `unroll`; by default all that the members have.
        quantization: of `int8`.
        providers: `cpu`, `cuda`, `tensorrt`; by default the CPU, and the others where there is a GPU for them. Where
            one cannot run a file, or leaves a part of it to the CPU, that row is a failure.
        splits: calibration images, for `int8`.
        rounds: of each alternative.
        clock: `wall`, or `cpu`: the time that this thread worked, which other programs disturb less; of one thread.
        memory: also run each alternative in a process of its own and take the most memory that it held.
        progress: called as the work goes on.

    Raises:
        InputError: a name or a number that cannot be, or images that are missing.
        MissingDependencyError: a provider that is not there or does not start.
    """
    wanted = list(providers) if providers is not None else _present()
    _check(batch_sizes, threads, precisions, layouts, wanted, rounds, clock)
    notes: list[str] = []
    uncertain = model.uncertain if isinstance(model, Bundle) else model
    if dense is None and isinstance(model, Bundle):
        dense = model.architecture(arch)
    files: list[File] = []
    loop: EagerLoop | None = None
    if uncertain is not None and dense is not None:
        loop = EagerLoop(dense, uncertain.members)
        _try(loop, uncertain)
        try:
            files.append(dense_file(dense, uncertain))
        except GateError as error:
            notes.append(f"the dense model's pass is left out: {error}")
    elif dense is None:
        notes.append(_NO_DENSE)
    if uncertain is not None:
        files += floor_files(uncertain)
    for name in wanted:
        session(model.onnx if isinstance(model, Bundle) else files[-1].content, providers=_PROVIDERS[name])
    files += compressed_files(model, precisions, layouts, quantization, splits, notes.append)
    last = session(files[-1].content)
    shape = tuple(last.get_inputs()[0].shape[1:])
    samples = int(last.get_modelmeta().custom_metadata_map["compress_uq.samples"])
    plan = _Plan(tuple(files), loop, shape, samples, rounds, clock, memory, notes)
    places = [(p, t, b) for p in wanted for t in threads for b in batch_sizes]
    rows: list[Timing] = []
    for step, (provider, count, batch) in enumerate(places):
        progress(Progress("benchmark", step, len(places), f"{provider}, batch {batch}"))
        rows += _place(plan, provider, count, batch)
    progress(Progress("benchmark", len(places), len(places)))
    return Benchmark(tuple(rows), samples, clock, _environment(), tuple(dict.fromkeys(notes)))


def _check(
    batch_sizes: Sequence[int],
    threads: Sequence[int],
    precisions: Sequence[str],
    layouts: Sequence[str] | None,
    providers: Sequence[str],
    rounds: int,
    clock: str,
) -> None:
    for name, values in (("batch sizes", batch_sizes), ("threads", threads), ("rounds", (rounds,))):
        if not values or min(values) < 1:
            raise InputError(f"{name} {', '.join(map(str, values)) or 'none'}: expected 1 or more")
    named = [("precision", precisions, PRECISIONS.names), ("layout", layouts or (), MEMBER_LAYOUTS.names),
             ("provider", providers, tuple(_PROVIDERS)), ("clock", (clock,), tuple(_CLOCKS))]  # fmt: skip
    for kind, given, known in named:
        for name in given:
            if name not in known:
                raise UnknownNameError(kind, name, known)
    if not precisions or not providers:
        raise InputError("nothing to time: expected a precision such as fp32 and a provider such as cpu")
    if clock == "cpu" and (set(threads) != {1} or set(providers) != {"cpu"}):
        raise InputError("clock 'cpu' counts the work of one thread: expected threads 1 and provider cpu alone")


def _try(loop: EagerLoop, model: UncertainModel) -> None:
    """Refuse a dense model that does not take the same images."""
    try:
        loop(model.origin.example(loop.network, "benchmark"))
    except (RuntimeError, ValueError, IndexError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"the dense model does not run on images {model.origin.input_shape}: {reason}") from error


def _present() -> list[str]:
    """The CPU, and what else onnxruntime has and this machine has a device and a library for."""
    there = ["cpu"]
    if torch.cuda.is_available():
        listed = available_providers()
        there += ["cuda"] * (_PROVIDERS["cuda"][0] in listed)
        tensorrt = _PROVIDERS["tensorrt"][0] in listed and ctypes.util.find_library("nvinfer") is not None
        there += ["tensorrt"] * tensorrt
    return there


def _place(plan: _Plan, provider: str, threads: int, batch: int) -> list[Timing]:
    """Every alternative on one provider, with one number of threads and one batch size."""
    runs: dict[str, Callable[[], object]] = {}
    failed: dict[str, str] = {}
    for file in plan.files:
        try:
            made = session(file.content, providers=_PROVIDERS[provider], threads=threads, fallback=False)
            feed = random_inputs(made, batch * file.images)
            made.run(None, feed)
        except (InputError, MissingDependencyError) as error:
            failed[file.name] = str(error)
        except Exception as error:  # onnxruntime's errors have no common type
            failed[file.name] = f"cannot run on {provider}: {str(error).strip().splitlines()[0]}"
        else:
            runs[file.name] = lambda made=made, feed=feed: made.run(None, feed)  # type: ignore[misc]
    if plan.loop is not None and (provider == "cpu" or torch.cuda.is_available()):
        runs[EAGER] = _eager(plan.loop, "cpu" if provider == "cpu" else "cuda", plan.shape, batch)
    with _torch_threads(threads):
        sparse = {EAGER: max(1, plan.rounds // _EAGER_ROUNDS)}
        listed = interleaved_times(runs, rounds=plan.rounds, sparse=sparse, clock=_CLOCKS[plan.clock])
    times = {name: np.array(values) for name, values in listed.items()}
    floor = [times.pop(name) for name in list(times) if name.startswith(FLOOR)]
    if floor and not any(name.startswith(FLOOR) for name in failed):
        times[FLOOR] = np.sum(floor, axis=0)
    return list(_rows(plan, Timing("", provider, threads, batch), times, failed))


def _rows(plan: _Plan, place: Timing, times: Mapping[str, np.ndarray], failed: Mapping[str, str]) -> Iterator[Timing]:
    """In one order everywhere: what is replaced, the floor, what replaces it."""
    files = {file.name: file for file in plan.files}
    order = [DENSE, EAGER, FLOOR, *(name for name in files if name != DENSE)]
    for name in order:
        file = files.get(name)
        row = replace(place, name=name)
        if file is not None:
            row = replace(row, precision=file.precision, layout=file.layout)
        if name in failed:
            yield replace(row, failure=failed[name])
        if name not in times:
            continue
        ran = times[name][~np.isnan(times[name])]
        p50, p90, p99 = (float(value) for value in np.percentile(ran, [50, 90, 99]))
        yield replace(
            row,
            rounds=len(ran),
            p50_ms=p50,
            p90_ms=p90,
            p99_ms=p99,
            images_per_second=1000 * place.batch / p50,
            to_dense=Ratio.of(times[name], times[DENSE]) if DENSE in times else None,
            to_floor=Ratio.of(times[name], times[FLOOR]) if FLOOR in times and name.startswith("compressed") else None,
            peak_bytes=_peak(plan, row, file) if plan.memory and place.provider == "cpu" else None,
        )


def _peak(plan: _Plan, row: Timing, file: File | None) -> int | None:
    """None where there is nothing to run alone."""
    try:
        if file is not None:
            return peak_of_file(file.content, row.batch, threads=row.threads)
        if row.name == EAGER and plan.loop is not None:
            return plan.loop.peak_bytes(plan.shape, row.batch)
    except GateError as error:
        plan.notes.append(str(error))
    return None


def _eager(loop: EagerLoop, device: str, shape: Sequence[int], batch: int) -> Callable[[], object]:
    moved = loop.to(device)
    images = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))
    return lambda: moved(images.to(device)).cpu()


@contextlib.contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _environment() -> dict[str, Any]:
    """Versions and the machine, by kind and not by name."""
    installed = (name for name in ("onnxruntime-gpu", "onnxruntime") if _version(name) is not None)
    found = {"compress-uq": __version__, "torch": torch.__version__}
    found |= {name: _version(name) or "" for name in installed}
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found["processor"] = models[0] if models else platform.processor() or platform.machine()
    found["cores"] = str(os.cpu_count())
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
