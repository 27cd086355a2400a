"""Means and standard deviations over the repeats of a run."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress_uq.study.runs import Run
from compress_uq.study.values import plain_text

__all__ = ["Group", "Summary", "grouped", "summarised"]


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation (ddof 1) of a measure; no deviation of a single value."""

    mean: float
    sd: float | None
    count: int

    def text(self) -> str:
        """`0.9012 ± 0.0031`, large numbers whole."""
        return _number(self.mean) if self.sd is None else f"{_number(self.mean)} ± {_number(self.sd, like=self.mean)}"


@dataclass(frozen=True)
class Group:
    """The runs that have the same values on some axes."""

    values: Mapping[str, Any]
    runs: tuple[Run, ...]

    def summary(self, measure: str) -> Summary | None:
        """Of the runs that have the measure; None where none has."""
        return summarised(run.measure(measure) for run in self.runs)

    def label(self) -> str:
        """`criterion l1, scope global`."""
        return ", ".join(f"{axis.replace('_', '-')} {plain_text(value)}" for axis, value in self.values.items())


def summarised(values: Iterable[float | None]) -> Summary | None:
    """Mean and deviation of the values that are defined; None where there is none."""
    defined = [value for value in values if value is not None]
    if not defined:
        return None
    sd = statistics.stdev(defined) if len(defined) > 1 else None
    return Summary(statistics.fmean(defined), sd, len(defined))


def grouped(runs: Iterable[Run], axes: Sequence[str]) -> list[Group]:
    """The runs by their values on the axes, in the order in which these first come."""
    found: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        found.setdefault(tuple(plain_text(run.value(axis)) for axis in axes), []).append(run)
    return [Group({axis: members[0].value(axis) for axis in axes}, tuple(members)) for members in found.values()]


def _number(value: float, like: float | None = None) -> str:
    return f"{value:,.0f}" if abs(value if like is None else like) >= 1000 else f"{value:.4f}"
