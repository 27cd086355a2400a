"""How long work tells where it is, without printing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Progress", "ProgressCallback", "silent"]


@dataclass(frozen=True)
class Progress:
    """One step of a stage."""

    stage: str
    step: int
    steps: int
    note: str = ""


ProgressCallback = Callable[[Progress], None]


def silent(_progress: Progress) -> None:
    """The default callback."""
