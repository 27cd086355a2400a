"""The export stage."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from compress_uq.errors import ArtifactError
from compress_uq.export.gates import check_graph
from compress_uq.export.graph import describe, to_graph
from compress_uq.storage import write_bytes
from compress_uq.uncertain import UncertainModel

__all__ = ["ExportResult", "export_onnx"]


@dataclass(frozen=True)
class ExportResult:
    """A file that passed every gate."""

    path: Path
    size_bytes: int
    gates: Mapping[str, str]
    """What each gate found."""


def export_onnx(
    model: UncertainModel,
    path: str | os.PathLike[str],
    *,
    sampling: str = "fixed",
    recipe_hash: str | None = None,
) -> ExportResult:
    """Write one ONNX file at opset 18 that gives a whole `Prediction`, checked before it is put in place.

    Args:
        model: an uncertain model.
        path: where the file goes; what is there is replaced only by a file that passed.
        sampling: `fixed` (the same request always gets the same answer), `seeded` (a second input `seed` (N,) int64),
            or `random` (fresh at each call).
        recipe_hash: recorded in the file.

    Raises:
        GateError: a gate failed; no file is left.
        UncertaintyError: the method cannot sample in that mode.
        ArtifactError: not an uncertain model, or the file cannot be written.
    """
    if not isinstance(model, UncertainModel):
        raise ArtifactError(
            f"export_onnx takes an UncertainModel, not a {type(model).__name__}: call fit_uncertainty first"
        )
    folder = Path(path).parent
    if not folder.is_dir():
        raise ArtifactError(f"{path}: the folder {folder} is not there: make it first")
    exported = copy.deepcopy(model).cpu().float()
    if sampling != exported.members.sampling:
        exported.members = exported.members.with_sampling(sampling)
    content = to_graph(exported, describe(exported, recipe_hash)).SerializeToString()
    gates = check_graph(content, exported)
    write_bytes(path, content)
    return ExportResult(Path(path), len(content), gates)
