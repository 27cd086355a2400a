"""The export stage."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

import numpy as np
import onnx
import torch

from compress_uq.data import Splits
from compress_uq.errors import ArtifactError, GateError, InputError, UnknownNameError
from compress_uq.export.body import assemble
from compress_uq.export.costs import CostTable, measure_layouts
from compress_uq.export.feeds import gate_image_count
from compress_uq.export.gates import check_graph
from compress_uq.export.graph import add_metadata, describe, to_graph
from compress_uq.export.layouts import LAYOUTS, FloatImages, Layout
from compress_uq.export.member_layouts import MEMBER_LAYOUTS
from compress_uq.export.parts import split_model
from compress_uq.export.precisions import PRECISIONS, Precision, calibration_images
from compress_uq.export.refit import refit
from compress_uq.footprint import parse_bytes
from compress_uq.progress import ProgressCallback, silent
from compress_uq.storage import write_bytes
from compress_uq.uncertain import UncertainModel

__all__ = ["ExportOptions", "ExportResult", "export_onnx", "layout_costs"]

_MOST_BRANCHES = 64
"""Samples up to which `auto` looks at a branch for each: more make a graph that takes long to load."""


class ExportOptions(TypedDict, total=False):
    """The form of a file, and how it is made, as `export_onnx` takes them by name."""

    sampling: str
    precision: str
    quantization: str
    layout: str
    max_memory: int | str | None
    input: str
    resize: tuple[int, int] | None
    splits: Splits | None
    on_cost: Callable[[CostTable], None] | None
    progress: ProgressCallback


@dataclass(frozen=True)
class ExportResult:
    """A file that passed every gate."""

    path: Path
    size_bytes: int
    gates: Mapping[str, str]
    """What each gate found."""
    refitted: tuple[str, ...] = ()
    """What was fitted again on the file's own logits: `calibrator`, `acceptance`, `sets`."""
    layout: str | None = None
    """How its members are laid out; None for a file that was exported before."""
    costs: CostTable | None = None
    """What the layouts cost, where that was measured."""


@dataclass(frozen=True)
class _Drafts:
    """A model on its way into a file."""

    model: UncertainModel
    layout: Layout
    precision: Precision
    splits: Splits | None

    def body(self, members: str) -> onnx.ModelProto | None:
        """The members' graph; None where the whole model is traced at once."""
        if members == self.model.members.layouts[0] and not self.precision.rounds:
            return None
        return self.precision.body(self.model, self.layout, self.splits, MEMBER_LAYOUTS[members]())

    def whole(self, body: onnx.ModelProto | None, model: UncertainModel | None = None) -> onnx.ModelProto:
        """The graph around it, of this model or of one with other parts behind the logits."""
        model = model or self.model
        return to_graph(model, {}, self.layout) if body is None else assemble(body, model, self.layout)


def export_onnx(
    model: UncertainModel,
    path: str | os.PathLike[str],
    *,
    sampling: str = "fixed",
    precision: str = "fp32",
    quantization: str = "cpu",
    layout: str = "auto",
    max_memory: int | str | None = None,
    input: str = "float32-nchw",
    resize: tuple[int, int] | None = None,
    splits: Splits | None = None,
    recipe_hash: str | None = None,
    on_cost: Callable[[CostTable], None] | None = None,
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
        layout: `fold` (samples in the batch axis), `unroll` (a branch for each), or `auto`: both are built and timed on
            this machine's CPU, and `unroll` is taken where it is at least 5 % faster.
        max_memory: bytes, or such as `900MB`, that a process may take that runs the file on a batch of 32 (fewer for
            large models): what needs more is not taken.
        input: `float32-nchw`, normalised, or `uint8-nhwc`, pixels that the graph normalises.
        resize: (H, W) of the pixels that are fed, where the graph is to bring them to the model's size.
        splits: `int8` takes its ranges from `calibration`. For `int8` and `fp16` the calibrator and the decision rules
            are fitted again on the file's own logits; without splits `fp16` keeps them. `fp32` has no use for them.
        recipe_hash: recorded in the file.
        on_cost: called with the table of costs before the file is written; without it costs are measured only as far as
            the choice needs them.
        progress: called as images are read.

    Raises:
        InputError: a name that is not there, images or a normalisation that are missing, or no layout within
            `max_memory`.
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
    most_bytes = None if max_memory is None else parse_bytes(max_memory)
    drafts = _drafts(model, sampling, PRECISIONS[precision](quantization), LAYOUTS[input], resize, splits)
    bodies = _bodies(drafts, layout)
    table, files = None, dict[str, onnx.ModelProto]()
    if len(bodies) > 1 or most_bytes is not None or on_cost is not None:
        files = {name: drafts.whole(body) for name, body in bodies.items()}
        table = _costs(drafts, files, most_bytes, layout != "auto", shown=on_cost is not None)
        if on_cost is not None:
            on_cost(table)
    taken = next(iter(bodies)) if table is None else table.chosen
    body, exported = bodies[taken], drafts.model
    refitted: tuple[str, ...] = ()
    if splits is not None and body is not None and drafts.precision.rounds:
        exported, refitted = refit(exported, body, splits, progress=progress)
        if splits.info.calibration_from_test:
            exported.origin = replace(exported.origin, reserved=splits.info.fingerprint)
    proto = files[taken] if taken in files and not refitted else drafts.whole(body, exported)
    described = describe(exported, recipe_hash, drafts.layout, precision)
    described |= {"layout": taken, "quantization": drafts.precision.described(), "refitted": refitted}
    add_metadata(proto, described)
    content = proto.SerializeToString()
    gates = check_graph(content, exported, _compared(splits, drafts.layout) if drafts.precision.rounds else None)
    write_bytes(path, content)
    return ExportResult(Path(path), len(content), gates, refitted, taken, table)


def layout_costs(
    model: UncertainModel,
    *,
    sampling: str = "fixed",
    precision: str = "fp32",
    quantization: str = "cpu",
    layout: str = "auto",
    max_memory: int | str | None = None,
    splits: Splits | None = None,
) -> CostTable:
    """What a file would cost in each layout, and which one `export_onnx` would take; nothing is written.

    Args and errors are those of `export_onnx`.
    """
    most_bytes = None if max_memory is None else parse_bytes(max_memory)
    drafts = _drafts(model, sampling, PRECISIONS[precision](quantization), FloatImages, None, splits)
    files = {name: drafts.whole(body) for name, body in _bodies(drafts, layout).items()}
    return _costs(drafts, files, most_bytes, layout != "auto", shown=True)


def _drafts(
    model: UncertainModel,
    sampling: str,
    precision: Precision,
    layout: type[Layout],
    resize: tuple[int, int] | None,
    splits: Splits | None,
) -> _Drafts:
    exported = copy.deepcopy(model).cpu().float()
    if sampling != exported.members.sampling:
        exported.members = exported.members.with_sampling(sampling)
    return _Drafts(exported, layout.of(exported.origin, resize), precision, splits)


def _bodies(drafts: _Drafts, layout: str) -> dict[str, onnx.ModelProto | None]:
    """The members' graph in every layout that comes into question.

    Raises:
        InputError: the members have no such layout.
    """
    members = drafts.model.members
    if layout != "auto":
        if layout not in MEMBER_LAYOUTS:
            raise UnknownNameError("layout", layout, ("auto", *MEMBER_LAYOUTS.names))
        if layout not in members.layouts:
            has = " or ".join(members.layouts)
            raise InputError(f"layout {layout!r}: {drafts.model.method.name} is laid out as {has}; take it, or auto")
        return {layout: drafts.body(layout)}
    first, *others = members.layouts
    bodies = {first: drafts.body(first)}
    for name in others if 1 < members.count <= _MOST_BRANCHES else ():
        with contextlib.suppress(GateError):  # the first one does
            bodies[name] = drafts.body(name)
    return bodies


def _costs(
    drafts: _Drafts, files: Mapping[str, onnx.ModelProto], most_bytes: int | None, asked: bool, *, shown: bool
) -> CostTable:
    parts = split_model(drafts.model) if shown and not drafts.precision.rounds else None
    return measure_layouts(files, parts=parts, memory=shown, most_bytes=most_bytes, asked=asked)


def _compared(splits: Splits | None, layout: Layout) -> np.ndarray | None:
    """Calibration images for the gates, in the file's layout; None without splits."""
    if splits is None:
        return None
    count = gate_image_count(splits.example().shape[1:])
    return layout.fed(torch.cat(list(calibration_images(splits, "the comparison with float32", count))))
