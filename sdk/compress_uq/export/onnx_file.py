"""The export stage."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from compress_uq.data import Splits
from compress_uq.errors import ArtifactError
from compress_uq.export.body import assemble
from compress_uq.export.feeds import gate_image_count
from compress_uq.export.gates import check_graph
from compress_uq.export.graph import add_metadata, describe, to_graph
from compress_uq.export.layouts import LAYOUTS, Layout
from compress_uq.export.precisions import PRECISIONS, calibration_images
from compress_uq.export.refit import refit
from compress_uq.progress import ProgressCallback, silent
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
    refitted: tuple[str, ...] = ()
    """What was fitted again on the file's own logits: `calibrator`, `acceptance`, `sets`."""


def export_onnx(
    model: UncertainModel,
    path: str | os.PathLike[str],
    *,
    sampling: str = "fixed",
    precision: str = "fp32",
    quantization: str = "cpu",
    input: str = "float32-nchw",
    resize: tuple[int, int] | None = None,
    splits: Splits | None = None,
    recipe_hash: str | None = None,
    progress: ProgressCallback = silent,
) -> ExportResult:
    """Write one ONNX file at opset 18 that gives a whole `Prediction`, checked before it is put in place.

    Args:
        model: an uncertain model.
        path: where the file goes; what is there is replaced only by a file that passed.
        sampling: `fixed` (the same request always gets the same answer), `seeded` (a second input `seed` (N,) int64),
            or `random` (fresh at each call).
        precision: `fp32`; `fp16`, the networks in half; or `int8`, their convolutions and matrix products in integers.
            What follows the members' logits is float32 in all of them.
        quantization: of `int8`: `cpu` (uint8 activations) or `tensorrt` (symmetric).
        input: `float32-nchw`, normalised, or `uint8-nhwc`, pixels that the graph normalises.
        resize: (H, W) of the pixels that are fed, where the graph is to bring them to the model's size.
        splits: `int8` takes its ranges from `calibration`. For `int8` and `fp16` the calibrator and the decision rules
            are fitted again on the file's own logits; without splits `fp16` keeps them. `fp32` has no use for them.
        recipe_hash: recorded in the file.
        progress: called as images are read.

    Raises:
        InputError: a name that is not there, or images or a normalisation that are missing.
        DecisionError: a rule cannot be certified on the file's logits.
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
    if Path(path).is_dir() or not os.access(folder, os.W_OK):
        raise ArtifactError(f"{path} cannot be written: name a file in a folder that can be written to")
    exported = copy.deepcopy(model).cpu().float()
    if sampling != exported.members.sampling:
        exported.members = exported.members.with_sampling(sampling)
    layout = LAYOUTS[input].of(exported.origin, resize)
    chosen = PRECISIONS[precision](quantization)
    body = chosen.body(exported, layout, splits)
    refitted: tuple[str, ...] = ()
    if body is None:
        proto = to_graph(exported, {}, layout)
    else:
        if splits is not None:
            exported, refitted = refit(exported, body, splits, progress=progress)
            if splits.info.calibration_from_test:
                exported.origin = replace(exported.origin, reserved=splits.info.fingerprint)
        proto = assemble(body, exported, layout)
    described = describe(exported, recipe_hash, layout, precision)
    add_metadata(proto, described | {"quantization": chosen.described(), "refitted": refitted})
    content = proto.SerializeToString()
    gates = check_graph(content, exported, None if body is None else _compared(splits, layout))
    write_bytes(path, content)
    return ExportResult(Path(path), len(content), gates, refitted)


def _compared(splits: Splits | None, layout: Layout) -> np.ndarray | None:
    """Calibration images for the gates, in the file's layout; None without splits."""
    if splits is None:
        return None
    count = gate_image_count(splits.example().shape[1:])
    return layout.fed(torch.cat(list(calibration_images(splits, "the comparison with float32", count))))
