"""Tables of a study, as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from compress_uq.study.file import Study, Table
from compress_uq.study.runs import Run
from compress_uq.study.statistics import Group, grouped
from compress_uq.study.values import plain_text

__all__ = ["markdown_table", "runs_csv", "table_csv", "table_rows"]


def table_rows(table: Table, runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of texts: means with deviations, and how many repeats where some are missing."""
    counted = [run for run in runs if run.meets(table.where)]
    columns = [None] if table.columns is None else grouped(counted, [table.columns])
    heads = [
        measure if column is None else f"{measure}, {column.label()}"
        for column in columns
        for measure in table.measures
    ]
    rows = []
    for group in grouped(counted, table.rows):
        cells = [_within(group, column) for column in columns]
        texts = [_cell(cell, measure) for cell in cells for measure in table.measures]
        rows.append([*(plain_text(value) for value in group.values.values()), *texts])
    return [*(axis.replace("_", "-") for axis in table.rows), *heads], rows


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """A table in Markdown; the first `left` columns are aligned left."""
    lines = [head, ["---" if i < left else "---:" for i in range(len(head))], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def table_csv(table: Table, runs: Sequence[Run]) -> str:
    """A line for each cell group: the axes, how many runs, and mean and deviation of each measure."""
    counted = [run for run in runs if run.meets(table.where)]
    axes = [*table.rows, *([] if table.columns is None else [table.columns])]
    head = [*axes, "runs", *(f"{measure}_{part}" for measure in table.measures for part in ("mean", "sd"))]
    lines: list[list[object]] = []
    for group in grouped(counted, axes):
        line: list[object] = [plain_text(value) for value in group.values.values()]
        line.append(sum(run.done for run in group.runs))
        for measure in table.measures:
            summary = group.summary(measure)
            line += ["", ""] if summary is None else [summary.mean, "" if summary.sd is None else summary.sd]
        lines.append(line)
    return _csv([head, *lines])


def runs_csv(study: Study, runs: Sequence[Run]) -> str:
    """A line for each run: its axes, every measure, and the failure of those that failed."""
    measures = sorted({name for run in runs if run.done and run.record for name in run.record["result"]})
    head = ["run", *study.axes, *measures, "error"]
    lines = [
        [
            run.name,
            *(plain_text(run.value(axis)) for axis in study.axes),
            *("" if (value := run.measure(name)) is None else value for name in measures),
            run.failure or "",
        ]
        for run in runs
    ]
    return _csv([head, *lines])


def _within(group: Group, column: Group | None) -> Group:
    if column is None:
        return group
    keys = {run.key for run in column.runs}
    return Group(group.values, tuple(run for run in group.runs if run.key in keys))


def _cell(group: Group, measure: str) -> str:
    if not group.runs:
        return ""
    summary = group.summary(measure)
    if summary is None:
        return "failed" if any(run.failure for run in group.runs) else "undefined" if any(
            run.done for run in group.runs
        ) else "to do"  # fmt: skip
    missing = "" if summary.count == len(group.runs) else f" ({summary.count} of {len(group.runs)})"
    return summary.text() + missing


def _csv(lines: Sequence[Sequence[object]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(lines)
    return stream.getvalue()
