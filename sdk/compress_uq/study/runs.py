"""The runs of a study and their records in its folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress_uq.errors import ArtifactError, InputError
from compress_uq.study.file import Study
from compress_uq.study.kinds import KINDS
from compress_uq.study.shared import digest
from compress_uq.study.values import plain_text

__all__ = ["Run", "Shelf", "planned"]


@dataclass(frozen=True)
class Run:
    """One run: its settings as the file gives them and as its kind reads them."""

    values: Mapping[str, Any]
    settings: Any
    key: str
    """Hash of what its result depends on."""
    name: str
    """For people: the settings that the grid varies, and the key."""
    record: Mapping[str, Any] | None = None
    """What it found, or why it failed; None while it is to do."""

    @property
    def done(self) -> bool:
        """It has a result."""
        return self.record is not None and self.record["error"] is None

    @property
    def failure(self) -> str | None:
        """The line that it failed with, if it did."""
        return None if self.record is None else self.record["error"]

    @property
    def state(self) -> str:
        """`done`, `to do`, or why it failed."""
        return "done" if self.done else "to do" if self.failure is None else f"failed: {self.failure}"

    def measure(self, name: str) -> float | None:
        """A figure of its result; None where it is not defined or the run is not done."""
        return self.record["result"].get(name) if self.done and self.record is not None else None

    def value(self, axis: str) -> Any:
        """The run's value on an axis; None where its grid does not have the axis."""
        return self.values.get(axis)

    def meets(self, where: Mapping[str, Any]) -> bool:
        """Whether the run has these settings; a list of values allows each."""
        return all(
            self.value(axis) == wanted or (isinstance(wanted, list) and self.value(axis) in wanted)
            for axis, wanted in where.items()
        )


def planned(study: Study) -> list[Run]:
    """Every run of a study, each once, in the file's order.

    Raises:
        InputError: settings that a run cannot have; says which run.
    """
    kind = KINDS[study.kind]
    runs: dict[str, Run] = {}
    for values in study.runs:
        place = ", ".join(f"{axis} = {plain_text(values[axis])}" for axis in study.axes if axis in values)
        try:
            settings = kind.read(values)
        except InputError as error:
            raise InputError(f"the run with {place}: {error}") from error
        key = digest({"kind": study.kind, **kind.identity(settings)})
        runs.setdefault(key, Run(values, settings, key, _name(study, values, key)))
    return list(runs.values())


class Shelf:
    """Records of runs, one JSON file each, found by their key whatever else their name says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, runs: Sequence[Run]) -> list[Run]:
        """The runs with the records that are there.

        Raises:
            ArtifactError: a record that is damaged.
        """
        files = {path.stem.rpartition("_")[2]: path for path in self._files()}
        return [Run(run.values, run.settings, run.key, run.name, self._record(files.get(run.key))) for run in runs]

    def find(self, run: Run) -> Path | None:
        """The file of a run's record, if it is there."""
        return next((path for path in self._files() if path.stem.rpartition("_")[2] == run.key), None)

    def place(self, run: Run) -> Path:
        """Where a run's record goes."""
        return self.find(run) or self.folder / f"{run.name}.json"

    def _files(self) -> Iterator[Path]:
        return (path for path in sorted(self.folder.glob("*.json")) if not path.name.startswith("."))

    def _record(self, path: Path | None) -> Mapping[str, Any] | None:
        if path is None:
            return None
        try:
            record: Mapping[str, Any] = json.loads(path.read_bytes())
            if set(record) >= {"result", "error", "settings"}:
                return record
        except (ValueError, TypeError):
            pass
        raise ArtifactError(f"{path} is not the record of a run: remove it, and the run is done again")


def _name(study: Study, values: Mapping[str, Any], key: str) -> str:
    parts = [f"{axis}-{Path(plain_text(values[axis])).stem if axis == 'model' else plain_text(values[axis])}"
             for axis in study.axes if axis in values]  # fmt: skip
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '-', '--'.join(parts))[:90]}_{key}"
