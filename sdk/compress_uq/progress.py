"""How long work tells where it is, without printing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

__all__ = ["Progress", "ProgressCallback", "silent", "within"]


@dataclass(frozen=True)
class Progress:
    """One step of a stage."""

    stage: str
    step: int
    steps: int
    note: str = ""


ProgressCallback = Callable[[Progress], None]


def within(progress: ProgressCallback, part: str) -> ProgressCallback:
    """A callback whose stages are those of a part of the work, such as `member 2/5: fine-tuning`."""
    return lambda step: progress(replace(step, stage=f"{part}: {step.stage}"))


def silent(_progress: Progress) -> None:
    """The default callback."""
