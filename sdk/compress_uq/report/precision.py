"""Files of one model in several precisions, side by side on the same images."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress_uq.data import Splits
from compress_uq.errors import InputError
from compress_uq.metrics import spearman
from compress_uq.progress import ProgressCallback, silent
from compress_uq.report.card import Requirement
from compress_uq.report.evaluation import Evaluation, evaluate
from compress_uq.runtime import OnnxPredictor

__all__ = ["PrecisionCard", "compare_precisions"]

SHOWN = ("accuracy", "ece", "nll", "ause")


@dataclass(frozen=True)
class PrecisionCard:
    """What each file gives, and how near it is to the first."""

    columns: Mapping[str, Evaluation]
    """By name, the reference first."""

    @property
    def reference(self) -> str:
        """What the others are compared with."""
        return next(iter(self.columns))

    def likeness(self, name: str) -> dict[str, float]:
        """Agreement of labels, Spearman correlation of mutual information, mean difference of a probability."""
        one, other = self.columns[self.reference].prediction, self.columns[name].prediction
        return {
            "agreement": float((one.label == other.label).mean()),
            "spearman_mutual_information": spearman(one.mutual_information, other.mutual_information),
            "difference": float(abs(one.probabilities - other.probabilities).mean()),
        }

    def unmet(self, name: str, requirements: Sequence[Requirement]) -> list[str]:
        """What a file misses of the requirements."""
        checked = [r.failure(self.columns[name].metrics.get(r.metric)) for r in requirements]
        return [failure for failure in checked if failure is not None]

    def rows(self) -> list[list[str]]:
        """Figures with their intervals, a column for each file."""
        measured = self.columns.values()
        rows = [[n, *(f"{c.metrics[n].value:.4f} [{c.metrics[n].low:.4f}, {c.metrics[n].high:.4f}]" for c in measured)]
                for n in SHOWN]  # fmt: skip
        alike = [self.likeness(name) for name in self.columns]
        rows += [[f"{n.replace('_', ' ')}, to {self.reference}", *(f"{a[n]:.4f}" for a in alike)] for n in alike[0]]
        return [*rows, ["bytes", *(f"{c.cost.size_bytes:,}" for c in measured)]]

    def to_markdown(self) -> str:
        """One table."""
        lines = ["| | " + " | ".join(self.columns) + " |", "|---" * (1 + len(self.columns)) + "|"]
        return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in self.rows())]) + "\n"

    def to_json(self) -> dict[str, Any]:
        """Each file's M of the report card, with its likeness to the reference; undefined figures are null."""
        content = {}
        for name, column in self.columns.items():
            alike = {key: None if value != value else value for key, value in self.likeness(name).items()}
            content[name] = {**column.to_json(), "likeness": alike}
        return {"reference": self.reference, "images": len(self.columns[self.reference].labels), "files": content}


def compare_precisions(
    files: Mapping[str, OnnxPredictor | str | os.PathLike[str]], splits: Splits, *, progress: ProgressCallback = silent
) -> PrecisionCard:
    """Measure exported files of one model on the same images.

    Args:
        files: by name; the first, usually `fp32`, is what the others are compared with.
        splits: needs `test`; `ood` adds the out-of-distribution figures.

    Raises:
        InputError: no file.
        DataError: no test split.
    """
    if not files:
        raise InputError("no file was given: expected the float32 file, and others to compare with it")
    return PrecisionCard({name: evaluate(file, splits, progress=progress, stage=name) for name, file in files.items()})
