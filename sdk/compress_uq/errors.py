"""Every error that compress-uq raises on purpose.

CompressUQError
├── InputError              what the caller gave cannot be used (command line: exit code 2)
│   ├── UnknownNameError    a name that no registry holds; carries the nearest ones
│   ├── ModelError          a model, checkpoint or architecture
│   ├── DataError           a data set, folder, split or label
│   ├── PruningError        nothing to prune, or a sparsity that cannot be
│   ├── UncertaintyError    a method that cannot act on this model
│   ├── CalibrationError    nothing to calibrate with
│   ├── DecisionError       a risk or coverage that the images cannot certify
│   └── ArtifactError       a bundle or an .onnx file that is damaged, foreign or does not keep its promises
│       └── VerificationError  it was read, and `verify` found what does not hold
├── MissingDependencyError  an optional library that is not installed, or two that clash
├── GateError               an exported graph failed a gate: the file was not kept (exit code 2)
└── RequirementNotMetError  a figure of the report card misses what `--require` asked for (exit code 1)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = [
    "ArtifactError",
    "CalibrationError",
    "CompressUQError",
    "DataError",
    "DecisionError",
    "GateError",
    "InputError",
    "MissingDependencyError",
    "ModelError",
    "PruningError",
    "RequirementNotMetError",
    "UncertaintyError",
    "UnknownNameError",
    "VerificationError",
]


class CompressUQError(Exception):
    """Root of every error raised on purpose; its text is one line that repeats the input and says what to do."""


class InputError(CompressUQError, ValueError):
    """What the caller gave cannot be used."""


class UnknownNameError(InputError):
    """A name that is not in its registry."""

    def __init__(self, kind: str, given: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "there is"
        listing = "" if near else " " + ", ".join(names)
        super().__init__(f"unknown {kind} {given!r}: {hint}{listing}")


class ModelError(InputError):
    """A model, checkpoint or architecture that cannot be used."""


class DataError(InputError):
    """A data set, split or label that cannot be used."""


class PruningError(InputError):
    """Nothing can be pruned, or not as asked."""


class UncertaintyError(InputError):
    """An uncertainty method that cannot act on this model."""


class CalibrationError(InputError):
    """Nothing to calibrate with, or a calibrator used before it was fitted."""


class DecisionError(InputError):
    """A risk or coverage that cannot be certified, or a decision rule used before it was fitted."""


class ArtifactError(InputError):
    """A bundle or exported file that is damaged, foreign, or does not keep its promises."""


class VerificationError(ArtifactError):
    """An artifact that was read and does not keep a promise; `checks` holds everything that was looked at."""

    def __init__(self, message: str, checks: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.checks = checks


class MissingDependencyError(CompressUQError, ImportError):
    """A library that is not installed, or two that clash."""


class GateError(CompressUQError):
    """An exported graph failed a gate; the file was not kept."""


class RequirementNotMetError(CompressUQError):
    """A figure of the report card misses a requirement."""
