"""What a kind of study is: it reads the settings of one run, and makes numbers of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from compress_uq.progress import ProgressCallback, silent
from compress_uq.study.shared import Shared

__all__ = ["Context", "Kind", "Outcome"]

S = TypeVar("S")


@dataclass(frozen=True)
class Context:
    """What a run may use beside its settings."""

    shared: Shared
    """What several runs need, made once."""
    work: Path
    """A folder for the state of this run's training; it outlives an interruption and goes when the run is done."""
    progress: ProgressCallback = silent


@dataclass(frozen=True)
class Outcome:
    """What a run found."""

    measures: Mapping[str, float | None]
    """Plain numbers by name; None where one is not defined."""
    notes: tuple[str, ...] = ()
    """Remarks on how they came about."""


class Kind(ABC, Generic[S]):
    """A kind of run, by its name in `[study] kind`; S is its settings, a frozen dataclass."""

    shown: ClassVar[tuple[str, ...]]
    """Measures that tables and plots show where a study names none."""
    axis: ClassVar[str]
    """What measures are plotted against where a study names nothing."""
    without_bearing: ClassVar[frozenset[str]] = frozenset()
    """Settings that say where and how a run is done, and that its result does not depend on."""

    @property
    @abstractmethod
    def settings(self) -> frozenset[str]:
        """Names of the settings, as Python spells them."""

    @property
    @abstractmethod
    def measures(self) -> frozenset[str]:
        """Names of all the measures that a run may have."""

    @abstractmethod
    def read(self, values: Mapping[str, Any]) -> S:
        """The settings of a run, from plain values by name.

        Raises:
            InputError: a value that cannot be, or two that do not go together.
        """

    @abstractmethod
    def identity(self, settings: S) -> Mapping[str, Any]:
        """Plain values that two runs share exactly when they would find the same."""

    @abstractmethod
    def run(self, settings: S, context: Context) -> Outcome:
        """Do the run.

        Raises:
            CompressUQError: it cannot be done; recorded as this run's failure.
        """

    def held_out(self, measure: str) -> str | None:
        """The measure's counterpart on held-out data; itself for one that needs no data; None where there is none."""
        return None

    def higher_is_better(self, measure: str) -> bool:
        """The direction in which a measure or a setting is preferred."""
        return False
