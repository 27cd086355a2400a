"""Doing a study: every run that is not done, once, whoever else works on the same folder."""

from __future__ import annotations

import os
import platform
import shutil
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress_uq._version import __version__
from compress_uq.errors import ArtifactError, CompressUQError
from compress_uq.progress import Progress, ProgressCallback, silent
from compress_uq.study.choose import Chosen, choose
from compress_uq.study.file import Study, read_study
from compress_uq.study.kind import Context, Outcome
from compress_uq.study.kinds import KINDS
from compress_uq.study.lock import held, held_or_not
from compress_uq.study.pages import write_pages
from compress_uq.study.runs import Run, Shelf, planned
from compress_uq.study.shared import TRAININGS, Shared, write_json
from compress_uq.study.tables import table_rows

__all__ = ["STAGE", "StudyResult", "plan_study", "run_study"]

FORMAT_VERSION = 1
STAGE = "study"
"""What progress calls the study as a whole; its note names a run and how that ended."""


@dataclass(frozen=True)
class StudyResult:
    """Where a study stands."""

    study: Study
    folder: Path
    runs: tuple[Run, ...]
    """In the file's order, with their records."""
    elsewhere: tuple[Run, ...] = ()
    """Runs that another process is doing."""

    @property
    def to_do(self) -> tuple[Run, ...]:
        """Runs that are not done; failed ones are tried again."""
        return tuple(run for run in self.runs if not run.done)

    @property
    def failed(self) -> tuple[Run, ...]:
        """Runs that ended in an error."""
        return tuple(run for run in self.runs if run.failure is not None)

    @property
    def faults(self) -> tuple[str, ...]:
        """Tracebacks of the errors that are ours and not the input's."""
        return tuple(run.record["traceback"] for run in self.failed if run.record and run.record.get("traceback"))

    @property
    def chosen(self) -> Chosen | None:
        """What `[choose]` comes to, if the study has it."""
        return choose(self.study, self.runs)

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Name, header and rows of each table, as texts."""
        return [(table.name, *table_rows(table, self.runs)) for table in self.study.tables]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        runs = [
            {"name": r.name, "settings": dict(r.values), "result": r.record and r.record["result"], "error": r.failure}
            for r in self.runs
        ]
        return {"study": self.study.name, "runs": runs, "chosen": self.chosen.to_json() if self.chosen else None}


def plan_study(study: Study | str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> StudyResult:
    """Every run of a study, its settings checked, and which of them are done; nothing is written.

    Args:
        study: a study, or its file.
        out: its folder; by default the file's stem, or the study's name, with `-study`.

    Raises:
        InputError: whatever is wrong with the file or with a run's settings.
    """
    read = study if isinstance(study, Study) else read_study(study)
    stem = read.name if isinstance(study, Study) else Path(study).stem
    folder = Path(f"{stem}-study") if out is None else Path(out)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / "runs").is_dir())):
        raise ArtifactError(f"{folder} is there and is not a study's folder: choose another --out")
    return StudyResult(read, folder, tuple(Shelf(folder / "runs").read(planned(read))))


def run_study(
    study: Study | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    progress: ProgressCallback = silent,
) -> StudyResult:
    """Do every run that is not done, and write tables and plots of all that are.

    A run's record is written when it is done, so that an interrupted study goes on where it stopped. A run that fails
    is recorded with its error, and the study goes on; the next call tries it again. Several processes may work on one
    folder: each run is done by one of them.

    Args:
        study: a study, or its file.
        out: its folder; by default the file's stem with `-study`.
        progress: called as the work goes on; the stage `study` counts the runs.

    Raises:
        InputError: whatever is wrong with the file or with a run's settings, before anything is done.
    """
    started = time.time()
    plan = plan_study(study, out)
    shelf, shared = Shelf(plan.folder / "runs"), Shared(plan.folder / "shared")
    for folder in (shelf.folder, plan.folder / "shared"):
        folder.mkdir(parents=True, exist_ok=True)
    done = sum(run.done for run in plan.runs)
    for run in plan.to_do:
        with held_or_not(plan.folder / "locks" / f"{run.key}.lock") as ours:
            if not ours:
                continue
            if not _recorded_since(shelf, run, started):
                progress(Progress(STAGE, done, len(plan.runs), f"{run.name} begins"))
                record = _record(plan, run, shared, progress)
                write_json(shelf.place(run), record)
                end = record["error"] or f"done in {record['seconds']:.0f} s"
                progress(Progress(STAGE, done + 1, len(plan.runs), f"{run.name}: {end}"))
            done += 1
    # Whoever writes last has read last, so that no page is left without a run that is done.
    with held(plan.folder / "locks" / "pages.lock"):
        runs = tuple(shelf.read(plan.runs))
        if all(run.done for run in runs):
            shared.clear(TRAININGS)
        result = StudyResult(plan.study, plan.folder, runs, tuple(run for run in runs if run.record is None))
        write_pages(plan.study, plan.folder, runs, result.chosen)
    return result


def _recorded_since(shelf: Shelf, run: Run, started: float) -> bool:
    """Another process did the run after this one had looked."""
    path = shelf.find(run)
    if path is None:
        return False
    (found,) = shelf.read([run])
    return found.done or path.stat().st_mtime >= started


def _record(plan: StudyResult, run: Run, shared: Shared, progress: ProgressCallback) -> dict[str, Any]:
    """Do one run; the content of its file."""
    kind = KINDS[plan.study.kind]
    work = plan.folder / "work" / run.key
    work.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    outcome, error, trace = Outcome({}), None, None
    try:
        outcome = kind.run(run.settings, Context(shared, work, progress))
    except CompressUQError as refused:
        error = " ".join(str(refused).split())
    except Exception as fault:
        error, trace = f"{type(fault).__name__}: {' '.join(str(fault).split())}", traceback.format_exc()
    if trace is None:
        shutil.rmtree(work)
    return {
        "format_version": FORMAT_VERSION,
        "kind": plan.study.kind,
        "settings": {k: v for k, v in run.values.items() if k not in kind.without_bearing},
        "seed": run.values.get("seed", 0),
        "result": dict(outcome.measures) if error is None else None,
        "error": error,
        **({} if trace is None else {"traceback": trace}),
        "notes": list(outcome.notes),
        "seconds": time.perf_counter() - begun,
        "versions": {"compress_uq": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
