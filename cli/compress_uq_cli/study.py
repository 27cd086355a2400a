"""`compress-uq study`: a grid of runs from one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import compress_uq as cuq
from compress_uq_cli import options as o
from compress_uq_cli.console import complain, note, print_json, progress, show_table

__all__ = ["study"]


def study(
    file: Annotated[Path, typer.Argument(help="TOML file with the grid; see docs/studies.md.")],
    out: Annotated[
        Path | None, typer.Option(help="The study's folder; by default the file's stem with -study.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs, done and to do, and stop.")] = False,
    json: o.Json = False,
) -> None:
    """Do every run of a grid that is not done yet, and write tables and plots of their results."""
    if dry_run:
        result = cuq.plan_study(file, out)
        show_table(f"{result.folder}", ["run", ""], [[run.name, run.state] for run in result.runs])
        note(f"{len(result.runs)} runs, {len(result.to_do)} to do")
        if json:
            print_json(result.to_json())
        return
    with progress() as callback:

        def tell(event: cuq.Progress) -> None:
            if event.stage == "study":
                note(f"[{event.step}/{event.steps}] {event.note}")
            callback(event)

        try:
            result = cuq.run_study(file, out, progress=tell)
        except KeyboardInterrupt:
            note("Finished runs are kept, and so is the training of this one: the same command goes on from there.")
            raise
    for title, head, rows in result.tables():
        show_table(title, head, rows)
    note(f"Tables and plots are in {result.folder}/study.md.")
    if result.chosen is not None:
        note(f"Chosen: {result.chosen.text()}")
    if result.elsewhere:
        note(f"Left to another process: {', '.join(run.name for run in result.elsewhere)}. The last to end has all.")
    if json:
        print_json(result.to_json())
    _end(result)


def _end(result: cuq.StudyResult) -> None:
    """Exit code 3 for a fault of ours, 2 for a run that its input does not allow, 1 for a bound that nothing keeps."""
    if result.faults:
        typer.echo(result.faults[-1], err=True)
        complain("this is a fault of compress-uq, not of your input: please report it with the lines above")
        raise typer.Exit(3)
    if result.failed:
        first = result.failed[0]
        raise cuq.InputError(
            f"{len(result.failed)} of {len(result.runs)} runs failed, the others are kept in {result.folder}: "
            f"{first.name}: {first.failure}"
        )
    if result.chosen is not None and result.chosen.group is None and not result.elsewhere:
        raise cuq.errors.RequirementNotMetError(f"{result.chosen.text()} (the runs are kept in {result.folder})")
