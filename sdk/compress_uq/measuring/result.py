"""What was measured: a row for each alternative and place, as a table, JSON and a picture."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np

from compress_uq.errors import ArtifactError
from compress_uq.storage import write_bytes

__all__ = ["Benchmark", "Ratio", "Timing"]

_COLOURS = {"dense": "#98a2b3", "floor": "#d0d5dd", "compressed": "#155eef"}


@dataclass(frozen=True)
class Ratio:
    """Of the times of two alternatives in the same round: median, and 10th to 90th percentile over rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, times: np.ndarray, base: np.ndarray) -> Ratio:
        """Rounds in which one of the two did not run do not count."""
        ratios = times / base
        low, median, high = np.nanpercentile(ratios, [10, 50, 90])
        return cls(float(median), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Timing:
    """One alternative, on one provider, with one number of threads and one batch size."""

    name: str
    provider: str
    threads: int
    batch: int
    precision: str | None = None
    layout: str | None = None
    failure: str | None = None
    """Why there are no figures; everything below is None then."""
    rounds: int | None = None
    p50_ms: float | None = None
    p90_ms: float | None = None
    p99_ms: float | None = None
    images_per_second: float | None = None
    """Of the median."""
    to_dense: Ratio | None = None
    """To one pass of the dense model."""
    to_floor: Ratio | None = None
    """To the trunk once and the tail T times, each timed alone in float32."""
    peak_bytes: int | None = None
    """Resident memory of a process of its own; None where it was not measured."""


@dataclass(frozen=True)
class Benchmark:
    """All rows, and under which conditions."""

    rows: tuple[Timing, ...]
    samples: int
    clock: str
    environment: Mapping[str, Any]
    notes: tuple[str, ...] = field(default=())

    columns = (
        "alternative", "provider", "threads", "batch", "p50 ms", "p90 ms", "p99 ms", "images/s", "to one dense pass",
        "to floor", "peak MB",
    )  # fmt: skip

    @property
    def failures(self) -> tuple[Timing, ...]:
        """Rows without figures."""
        return tuple(row for row in self.rows if row.failure is not None)

    def find(self, name: str, batch: int, *, provider: str = "cpu", threads: int = 1) -> Timing:
        """One row.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if (row.name, row.batch, row.provider, row.threads) == (name, batch, provider, threads):
                return row
        raise KeyError(f"{name} at batch {batch} on {provider} with {threads} threads")

    def table(self) -> list[list[str]]:
        """Under `columns`."""
        return [_line(row) for row in self.rows]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "samples": self.samples,
            "clock": self.clock,
            "environment": dict(self.environment),
            "rows": [asdict(row) for row in self.rows],
            "notes": list(self.notes),
        }

    def to_markdown(self) -> str:
        """The table, and what has to be said of it."""
        lines = ["| " + " | ".join(self.columns) + " |", "|---" * len(self.columns) + "|"]
        lines += ["| " + " | ".join(line) + " |" for line in self.table()]
        said = [f"{key}: {value}" for key, value in self.environment.items()]
        paragraphs = ["\n".join(lines), "; ".join([*said, f"clock: {self.clock}"]) + ".", *self.notes]
        return "\n\n".join(paragraphs) + "\n"

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write benchmark.json, benchmark.md and benchmark.png into a folder, which is made where it is not there.

        Raises:
            ArtifactError: it cannot be written to.
        """
        contents = {"json": json.dumps(self.to_json(), indent=1).encode(), "md": self.to_markdown().encode()}
        contents["png"] = self.to_png()
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(f"{folder} could not be made ({error.strerror}): choose another --out") from error
        for suffix, content in contents.items():
            write_bytes(Path(folder) / f"benchmark.{suffix}", content)

    def to_png(self) -> bytes:
        """Median latency of each alternative, up to the 90th percentile, a panel for each place and batch size."""
        rows = [row for row in self.rows if row.p50_ms is not None]
        panels = list(dict.fromkeys((row.provider, row.threads, row.batch) for row in rows))
        figure = matplotlib.figure.Figure(figsize=(8, 0.6 + 0.35 * len(rows) + 0.9 * len(panels)), layout="constrained")
        counts = [sum((r.provider, r.threads, r.batch) == panel for r in rows) for panel in panels]
        axes = figure.subplots(max(1, len(panels)), 1, squeeze=False, height_ratios=counts or None)[:, 0]
        for axis, panel in zip(axes, panels, strict=False):
            self._panel(axis, panel, [row for row in rows if (row.provider, row.threads, row.batch) == panel])
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=150)
        return content.getvalue()

    def _panel(self, axis: Any, panel: tuple[str, int, int], rows: Sequence[Timing]) -> None:
        provider, threads, batch = panel
        middle = np.array([row.p50_ms for row in rows])
        above = np.array([row.p90_ms for row in rows]) - middle
        colours = [_COLOURS[row.name.split(",")[0].split(":")[0]] for row in rows]
        axis.barh([row.name for row in rows], middle, xerr=[0 * above, above], color=colours, capsize=2)
        axis.set_xscale("log")
        axis.invert_yaxis()
        axis.set_xlabel("milliseconds (log)")
        axis.set_title(f"batch {batch}, {provider}, {threads} thread{'s' * (threads > 1)}", loc="left", fontsize=10)


def _line(row: Timing) -> list[str]:
    place = [row.name, row.provider, str(row.threads), str(row.batch)]
    if row.failure is not None:
        return [*place, f"failed: {row.failure}", *[""] * (len(Benchmark.columns) - len(place) - 1)]
    times = [_number(value, 2) for value in (row.p50_ms, row.p90_ms, row.p99_ms)]
    ratios = ["-" if ratio is None else str(ratio) for ratio in (row.to_dense, row.to_floor)]
    peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.0f}"
    return [*place, *times, _number(row.images_per_second, 1), *ratios, peak]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
