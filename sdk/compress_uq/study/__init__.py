"""Grids of runs: resumable, their results on disk, with tables, plots and a choice."""

from compress_uq.study.file import Choice, Plot, Study, Table, read_study
from compress_uq.study.kind import Context, Kind, Outcome
from compress_uq.study.kinds import KINDS
from compress_uq.study.runner import StudyResult, plan_study, run_study
from compress_uq.study.shared import Shared

__all__ = [
    "KINDS",
    "Choice",
    "Context",
    "Kind",
    "Outcome",
    "Plot",
    "Shared",
    "Study",
    "StudyResult",
    "Table",
    "plan_study",
    "read_study",
    "run_study",
]
