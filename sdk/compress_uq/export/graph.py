"""From an uncertain model to an ONNX graph, and what is written into the file beside it."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from compress_uq._version import __version__
from compress_uq.cost import count_macs
from compress_uq.errors import ArtifactError, GateError
from compress_uq.export.layouts import FloatImages, Layout
from compress_uq.fitted import Fitted
from compress_uq.runtime import METADATA_PREFIX
from compress_uq.types import DECISION_NAMES, OUTPUT_NAMES
from compress_uq.uncertain import UncertainModel

__all__ = ["OPSET", "add_metadata", "describe", "example_inputs", "output_names", "to_graph", "trace"]

OPSET = 18
_LIMIT = 2_000_000_000


class _Exported(nn.Module):
    """The model with its outputs as a plain tuple, fed in the file's layout."""

    def __init__(self, model: UncertainModel, layout: Layout) -> None:
        super().__init__()
        self.model, self.layout = model, layout

    def forward(self, images: Tensor, seed: Tensor | None = None) -> tuple[Tensor, ...]:
        return tuple(field for field in self.model(self.layout(images), seed) if field is not None)


def example_inputs(model: UncertainModel, images: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Random inputs of the model's shape: images, and seeds where it takes them."""
    shape = model.origin.input_shape
    if shape is None:
        raise ArtifactError("the shape of an image is not known: pass example_inputs= to fit_uncertainty")
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randn(images, *shape, generator=generator)
    if model.members.sampling != "seeded":
        return (batch,)
    return batch, torch.randint(-(2**62), 2**62, (images,), generator=generator)


def to_graph(model: UncertainModel, described: Mapping[str, Any], layout: Layout | None = None) -> onnx.ModelProto:
    """The ONNX graph of a model, free of anything that tells where it was made.

    Raises:
        ArtifactError: it would exceed the 2 GB of a single file.
    """
    layout = layout or FloatImages()
    images, *seed = example_inputs(model, 2)
    inputs = dict(zip(("images", "seed"), (layout.like(images), *seed), strict=False))
    proto = trace(_Exported(model, layout), inputs, output_names(model))
    add_metadata(proto, described)
    return proto


def trace(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    batch: int = 0,
    several: Mapping[str, Tensor] | None = None,
) -> onnx.ModelProto:
    """The graph of a module whose inputs have the images along the axis `batch`; it names no source file.

    Args:
        module: put in eval.
        inputs: by name, in order.
        outputs: names.
        batch: the axis; one of length 1 is alike for all images and stays so.
        several: further inputs, which the module takes as one tuple.

    Raises:
        ArtifactError: it would exceed the 2 GB of a single file.
        GateError: torch cannot export the module.
    """
    size = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
    if size > _LIMIT:
        raise ArtifactError(f"the model holds {size / 1e9:.1f} GB: one ONNX file holds under 2 GB; prune more")
    axis = torch.export.Dim("N")
    arguments: tuple[Any, ...] = tuple(inputs.values())
    shapes: tuple[Any, ...] = tuple({batch: axis} for _ in inputs)
    if several:
        arguments += (tuple(several.values()),)
        shapes += (tuple({batch: axis} if value.shape[batch] > 1 else {} for value in several.values()),)
    try:
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module.eval(),
                arguments,
                dynamo=True,
                opset_version=OPSET,
                external_data=False,
                dynamic_shapes=shapes,
                input_names=[*inputs, *(several or {})],
                output_names=list(outputs),
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        cause = error.__cause__ or error
        raise GateError(f"torch cannot export this model: {str(cause).strip().splitlines()[0]}") from error
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    _strip(proto)
    return proto


def add_metadata(proto: onnx.ModelProto, described: Mapping[str, Any]) -> None:
    """Write what the file says of itself into it."""
    for key, value in described.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = METADATA_PREFIX + key, json.dumps(value)


def output_names(model: UncertainModel) -> list[str]:
    """The names of a model's outputs, in order."""
    rules = zip(DECISION_NAMES, (model.acceptance, model.sets), strict=True)
    return [*OUTPUT_NAMES, *(name for name, rule in rules if rule is not None)]


def describe(
    model: UncertainModel, recipe_hash: str | None, layout: Layout | None = None, precision: str = "fp32"
) -> dict[str, Any]:
    """What the file says of itself; plain values."""
    layout = layout or FloatImages()
    origin = model.origin
    method = model.method
    return {
        "format_version": 1,
        "labels": origin.labels,
        "input": {"shape": origin.input_shape, "mean": origin.mean, "std": origin.std, **layout.described()},
        "precision": precision,
        "method": method.name,
        "method_options": vars(method),
        "method_found": dict(model.members.found),
        "samples": model.members.count,
        "sampling": model.members.sampling,
        "calibration": model.calibrator.name,
        "calibration_state": _state(model.calibrator),
        "score": model.score.name,
        "ood_score": model.ood_score.name,
        "data": origin.data,
        "reserved_data": origin.reserved,
        "thresholds": {
            name: {"rule": rule.name, "options": rule.options, **_state(rule)}
            for name, rule in zip(DECISION_NAMES, (model.acceptance, model.sets), strict=True)
            if rule is not None
        },
        "answers": model.record,
        "outputs": output_names(model),
        "macs": _macs(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "fidelity": _fidelity(model),
        "recipe_sha256": recipe_hash,
        "versions": {"compress-uq": __version__, **{n: metadata.version(n) for n in ("torch", "onnx", "onnxscript")}},
    }


def _state(module: Fitted) -> dict[str, Any]:
    return {k: np.asarray(v.cpu()).tolist() for k, v in module.state_dict().items()}


def _fidelity(model: UncertainModel) -> dict[str, Any] | None:
    """How well the file's fixed members stand for many; where they are drawn anew, nothing was measured."""
    known = model.members.fidelity
    return None if known is None or model.members.sampling != "fixed" else asdict(known)


def _macs(model: UncertainModel) -> int:
    """MACs of one image with all members; how the masks are drawn costs none."""
    fixed = copy.copy(model)
    fixed._modules = dict(model._modules, members=model.members.with_sampling("fixed"))
    return count_macs(fixed, example_inputs(fixed, 1)[0])


def _strip(proto: onnx.ModelProto) -> None:
    """Remove traces of the exporting machine: stack traces, file names, doc strings."""
    del proto.metadata_props[:]
    proto.doc_string = ""
    graph = proto.graph
    graph.doc_string = ""
    del graph.metadata_props[:]
    for item in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        item.doc_string = ""
        del item.metadata_props[:]
    del graph.value_info[:]


@contextlib.contextmanager
def _quiet() -> Any:
    """The exporter prints and logs; a library does not."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
