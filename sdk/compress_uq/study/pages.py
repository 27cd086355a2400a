"""What a study leaves for people and programs: study.md, runs.csv, and a file for each table and picture."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from compress_uq.storage import write_bytes
from compress_uq.study.choose import Chosen
from compress_uq.study.file import Study
from compress_uq.study.plots import draw
from compress_uq.study.runs import Run
from compress_uq.study.tables import markdown_table, runs_csv, table_csv, table_rows

__all__ = ["write_pages"]


def write_pages(study: Study, folder: Path, runs: Sequence[Run], chosen: Chosen | None) -> None:
    """Write every table and picture of the runs that are done.

    Raises:
        ArtifactError: a file cannot be written.
    """
    write_bytes(folder / "runs.csv", runs_csv(study, runs).encode())
    parts = [f"# {study.name}", _standing(runs)]
    if chosen is not None:
        parts += ["## Chosen", chosen.text()]
        if chosen.group is not None:
            rows = [[name, "" if found is None else found.text()] for name, found in chosen.test.items()]
            parts.append(markdown_table(["on test", ""], rows, 1))
    for place, table in zip(_places(t.name for t in study.tables), study.tables, strict=True):
        _write(folder / "tables" / f"{place}.csv", table_csv(table, runs).encode())
        head, rows = table_rows(table, runs)
        parts += [f"## {table.name}", markdown_table(head, rows, len(table.rows)), f"[CSV](tables/{place}.csv)"]
    pictures = []
    for place, plot in zip(_places(p.name for p in study.plots), study.plots, strict=True):
        content = draw(plot, study, runs)
        if content is not None:
            _write(folder / "plots" / f"{place}.png", content)
            pictures.append(f"![{plot.y} against {plot.x}](plots/{place}.png)")
    parts += ["## Plots", *pictures] if pictures else []
    failed = [run for run in runs if run.failure is not None]
    if failed:
        parts += ["## Failed", "\n".join(f"- {run.name}: {run.failure}" for run in failed)]
    notes = dict.fromkeys(note for run in runs if run.record is not None for note in run.record["notes"])
    if notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in notes)]
    write_bytes(folder / "study.md", ("\n\n".join(parts) + "\n").encode())


def _standing(runs: Sequence[Run]) -> str:
    done, failed = sum(run.done for run in runs), sum(run.failure is not None for run in runs)
    left = len(runs) - done - failed
    counts = [f"{done} of {len(runs)} runs are done", *([f"{failed} failed"] if failed else [])]
    counts += [f"{left} are to do"] if left else []
    return f"{', '.join(counts)}. Figures are means and, after ±, standard deviations (n - 1) over repeated runs."


def _places(names: Iterable[str]) -> list[str]:
    """File names, each once."""
    found: list[str] = []
    for name in names:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "unnamed"
        count = sum(other == stem or re.fullmatch(re.escape(stem) + r"-\d+", other) is not None for other in found)
        found.append(stem if count == 0 else f"{stem}-{count + 1}")
    return found


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    write_bytes(path, content)
