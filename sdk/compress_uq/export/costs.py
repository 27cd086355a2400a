"""What a model's graph costs in each layout of its members, counted and measured, and which one is taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import onnx

from compress_uq.cost import interleaved_milliseconds
from compress_uq.errors import GateError, InputError
from compress_uq.export.graph_cost import graph_cost
from compress_uq.export.parts import Parts
from compress_uq.footprint import peak_of_file, random_inputs
from compress_uq.runtime import session

__all__ = ["CostTable", "LayoutCost", "measure_layouts"]

_SERVED = (32, 8, 1)
_MOST_MACS, _MOST_BYTES = 30e9, 2e9
"""Of one run that is timed: about a second of one core, and memory that a common machine has."""
_CHEAPER = 0.95
"""Unrolling is taken where it needs less than this share of folding's time: a smaller gain drowns in noise."""


@dataclass(frozen=True)
class LayoutCost:
    """One layout: counts per image or batch, milliseconds of one thread per batch."""

    layout: str
    macs: int
    """Multiply-accumulates of one image with all its members."""
    file_bytes: int
    activation_bytes: Mapping[int, int]
    """By batch: computed tensors that are held at once, as far as the graph tells their shapes."""
    estimated_ms: Mapping[int, float]
    """By batch: the trunk alone, and the tail alone as often as the layout runs it; empty where they cannot be told."""
    measured_ms: Mapping[int, float]
    """By batch: median of the whole file."""
    peak_bytes: int | None
    """Resident memory of a process that runs the file at the larger batch; None where it was not measured."""


@dataclass(frozen=True)
class CostTable:
    """All layouts that could be taken, and the one that is."""

    layouts: tuple[LayoutCost, ...]
    chosen: str
    reason: str

    def rows(self) -> list[list[str]]:
        """A row for each layout, under `columns`."""
        return [
            [
                f"{cost.layout} *" if cost.layout == self.chosen else cost.layout,
                f"{cost.macs / 1e6:,.1f}",
                f"{cost.file_bytes / 1e6:,.2f}",
                *(f"{cost.activation_bytes[batch] / 1e6:,.2f}" for batch in self.batches),
                *(_milliseconds(cost.estimated_ms.get(batch)) for batch in self.batches),
                *(_milliseconds(cost.measured_ms[batch]) for batch in self.batches),
                "-" if cost.peak_bytes is None else f"{cost.peak_bytes / 1e6:,.0f}",
            ]
            for cost in self.layouts
        ]

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes."""
        return tuple(self.layouts[0].measured_ms)

    @property
    def columns(self) -> list[str]:
        """Headings of `rows`."""
        per_batch = [f"{what} ({batch})" for what in ("activations MB", "estimated ms", "measured ms")
                     for batch in self.batches]  # fmt: skip
        return ["layout", "MMACs", "file MB", *per_batch, "peak MB"]

    def to_json(self) -> dict[str, Any]:
        """Plain values; batch sizes are keys."""
        layouts = [{name: _plain(value) for name, value in asdict(cost).items()} for cost in self.layouts]
        return {"chosen": self.chosen, "reason": self.reason, "layouts": layouts}


def measure_layouts(
    files: Mapping[str, onnx.ModelProto], *, parts: Parts | None, memory: bool, most_bytes: int | None, asked: bool
) -> CostTable:
    """Count, time and weigh every layout, and choose one.

    Args:
        files: the whole graph, by layout.
        parts: the network cut where its members part, for the estimate.
        memory: whether to measure it, which takes a process for each layout.
        most_bytes: what a process that runs the file may take.
        asked: whether the only layout is the one that the caller wants.

    Raises:
        InputError: no layout fits into `most_bytes`.
        GateError: onnxruntime loads none.
    """
    batches = _batches(next(iter(files.values())))
    contents = {name: proto.SerializeToString() for name, proto in files.items()}
    sessions = _sessions(contents)
    costs = []
    timed = _timed(sessions, parts, batches)
    for name in sessions:
        proto = files[name]
        counted = {batch: graph_cost(proto, batch) for batch in batches}
        cost = LayoutCost(
            layout=name,
            macs=counted[1].macs,
            file_bytes=len(contents[name]),
            activation_bytes={batch: count.activation_bytes for batch, count in counted.items()},
            estimated_ms={batch: timed[f"{name} estimated", batch] for batch in batches if parts is not None},
            measured_ms={batch: timed[name, batch] for batch in batches},
            peak_bytes=None,
        )
        if memory or most_bytes is not None:
            cost = replace(cost, peak_bytes=peak_of_file(contents[name], max(batches)))
        costs.append(cost)
    return _chosen(tuple(costs), max(batches), most_bytes, asked)


def _batches(proto: onnx.ModelProto) -> tuple[int, ...]:
    """One image, and a batch as a server forms it, smaller where that would take long."""
    one = graph_cost(proto, 1)
    served = next(
        n for n in _SERVED if n == 1 or (n * one.macs <= _MOST_MACS and n * one.activation_bytes <= _MOST_BYTES)
    )
    return (1, served) if served > 1 else (1,)


def _sessions(contents: Mapping[str, bytes]) -> dict[str, Any]:
    """Those that onnxruntime loads, which is the first at the least."""
    made: dict[str, Any] = {}
    for name, content in contents.items():
        try:
            made[name] = session(content, threads=1)
        except Exception as error:  # onnxruntime's errors have no common type
            if not made:
                reason = str(error).splitlines()[0]
                raise GateError(f"gate 'loads': onnxruntime refuses the graph: {reason}") from error
    return made


def _timed(sessions: Mapping[str, Any], parts: Parts | None, batches: Sequence[int]) -> dict[tuple[str, int], float]:
    """Milliseconds by layout, or `LAYOUT estimated`, and batch."""
    cut = {} if parts is None else {"trunk": parts.trunk, "tail": parts.tail}
    plain = {name: session(content, threads=1) for name, content in cut.items() if content is not None}
    found: dict[tuple[str, int], float] = {}
    for batch in batches:
        runs = {name: _run(made, batch) for name, made in sessions.items()}
        if parts is not None:
            runs["tail of all"] = _run(plain["tail"], batch * parts.members)
            runs["tail of one"] = _run(plain["tail"], batch)
        if "trunk" in plain:
            runs["trunk"] = _run(plain["trunk"], batch)
        times = interleaved_milliseconds(runs, rounds=9, seconds=2.0)
        found |= {(name, batch): times[name] for name in sessions}
        if parts is not None:
            trunk = times.get("trunk", 0.0)
            found["fold estimated", batch] = trunk + times["tail of all"]
            found["unroll estimated", batch] = trunk + parts.members * times["tail of one"]
    return found


def _run(made: Any, batch: int) -> Callable[[], object]:
    feed = random_inputs(made, batch)
    return lambda: made.run(None, feed)


def _chosen(costs: tuple[LayoutCost, ...], batch: int, most_bytes: int | None, asked: bool) -> CostTable:
    fitting = [cost for cost in costs if most_bytes is None or (cost.peak_bytes or 0) <= most_bytes]
    if not fitting:
        needs = " and ".join(f"{cost.layout} needs {_size(cost.peak_bytes or 0)}" for cost in costs)
        raise InputError(
            f"--max-memory (max_memory=) {_size(most_bytes or 0)}: {needs} at batch {batch}; "
            "allow more, prune more, or take fewer samples"
        )
    if len(costs) == 1:
        return CostTable(costs, costs[0].layout, "asked for" if asked else "the only one for this model")
    if len(fitting) == 1:
        large = next(cost for cost in costs if cost is not fitting[0])
        return CostTable(costs, fitting[0].layout, f"{large.layout} needs {_size(large.peak_bytes or 0)}")
    fold, unroll = sorted(costs, key=lambda cost: cost.layout)
    ratios = [unroll.measured_ms[n] / fold.measured_ms[n] for n in fold.measured_ms]
    ratio = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
    taken = unroll if ratio < _CHEAPER else fold
    return CostTable(costs, taken.layout, f"unroll takes {ratio:.2f} of the time of fold")


def _plain(value: Any) -> Any:
    return {str(key): each for key, each in value.items()} if isinstance(value, dict) else value


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
