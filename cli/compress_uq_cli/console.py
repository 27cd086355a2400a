"""What a person sees: progress, tables and complaints on stderr; JSON on stdout."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

import compress_uq as cuq

__all__ = ["complain", "console", "note", "print_json", "progress", "show_table"]

console = Console(stderr=True, highlight=False, soft_wrap=True)


def complain(message: str) -> None:
    """One line on stderr."""
    print(f"compress-uq: {' '.join(message.split())}", file=sys.stderr)  # noqa: T201


def note(message: str) -> None:
    """A remark on stderr."""
    console.print(message, markup=False)


def print_json(content: Any) -> None:
    """A result on stdout."""
    json.dump(content, sys.stdout, indent=1)
    sys.stdout.write("\n")


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stderr."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=number == 0)
    for row in rows:
        table.add_row(*row)
    # A file or pipe has no width; the table takes what it needs there.
    wide = console if console.is_terminal else Console(stderr=True, highlight=False, width=200)
    wide.print(table)


@contextmanager
def progress() -> Iterator[Any]:
    """A callback that draws one bar per stage, with the time left; what the card will say is not said twice."""
    logging.captureWarnings(True)
    bars = Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
    )
    tasks: dict[str, Any] = {}

    def show(event: cuq.Progress) -> None:
        if event.stage not in tasks:
            tasks[event.stage] = bars.add_task(event.stage, total=event.steps, note="")
            if not console.is_terminal:
                note(f"{event.stage} …")
        bars.update(tasks[event.stage], completed=event.step, total=event.steps, note=event.note)

    with warnings.catch_warnings(), bars:
        warnings.simplefilter("ignore")
        yield show
