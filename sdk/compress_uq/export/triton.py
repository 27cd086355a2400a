"""A model repository for NVIDIA's Triton Inference Server, made from an exported file."""

from __future__ import annotations

import json
import os
import re
from importlib import resources
from pathlib import Path

import onnx

from compress_uq.errors import ArtifactError, GateError, InputError, UnknownNameError
from compress_uq.export.gates import check_graph
from compress_uq.export.onnx_file import ExportResult
from compress_uq.export.triton_config import INSTANCE_KINDS, TritonOptions, model_config, tensors, to_text
from compress_uq.runtime import METADATA_PREFIX, read_model
from compress_uq.storage import replace_directory

__all__ = ["TritonOptions", "export_triton"]

_LABELS = "labels.txt"
_BACKENDS: dict[str, dict[str, str]] = {"onnxruntime": {}, "python": {"model.py": "triton_model.py.txt"}}
"""What a backend wants beside model.onnx: the name there, and the file of this package that it is."""


def export_triton(
    file: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    options: TritonOptions | None = None,
    overwrite: bool = False,
) -> ExportResult:
    """Put an exported file into a model repository as `NAME/config.pbtxt` and `NAME/1/model.onnx`.

    Args:
        file: the exported `.onnx` file, in any sampling mode and precision. It passes every gate again.
        path: the model repository; made where it is not there. Other models in it are left alone.
        options: how the model is served.
        overwrite: replace the folder of a model of this name.

    Raises:
        InputError: an option that cannot be.
        ArtifactError: the file is not one of ours or does not pass a gate, or the model's folder exists. Nothing is
            written then.
    """
    served = options or TritonOptions()
    _refuse_impossible(served)
    content = read_model(file)
    try:
        gates = check_graph(content, None)
    except (ArtifactError, GateError) as error:
        raise ArtifactError(f"{file}: {error}") from error
    proto = onnx.load_from_string(content)
    recorded = {p.key.removeprefix(METADATA_PREFIX): json.loads(p.value) for p in proto.metadata_props}
    if recorded["sampling"] == "random" and served.instances > 1:
        raise InputError(
            f"{served.instances} instances of a file with sampling 'random' would draw the same samples: "
            "take 1 instance, or export with sampling 'seeded'"
        )
    labels = recorded.get("labels")
    config = model_config(served, tensors(proto.graph.input), tensors(proto.graph.output), _LABELS if labels else None)
    files = {"config.pbtxt": to_text(config).encode(), "1/model.onnx": content}
    if labels:
        files[_LABELS] = "".join(" ".join(str(label).split()) + "\n" for label in labels).encode()
    for name, source in _BACKENDS[served.backend].items():
        files[f"1/{name}"] = resources.files("compress_uq.export").joinpath(source).read_bytes()
    target = Path(path) / served.name
    with replace_directory(
        target, overwrite=overwrite, mark="config.pbtxt", kind="Triton model", workplace=_beside(target.parent)
    ) as folder:
        (folder / "1").mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
    return ExportResult(target, sum(map(len, files.values())), gates)


def _beside(repository: Path) -> Path | None:
    """A place outside the repository: a server takes every folder in it for a model, hidden and half-written ones too.

    None where files cannot be moved from there, as with a volume that is mounted at the repository itself.
    """
    outside = next(folder for folder in repository.absolute().parents if folder.is_dir())
    same_volume = not repository.exists() or outside.stat().st_dev == repository.stat().st_dev
    return outside if same_volume and os.access(outside, os.W_OK) else None


def _refuse_impossible(options: TritonOptions) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", options.name):
        raise InputError(f"name {options.name!r}: expected letters, digits, '_', '-' and '.', not starting with '.'")
    if options.backend not in _BACKENDS:
        raise UnknownNameError("backend", options.backend, _BACKENDS)
    if options.instance_kind not in INSTANCE_KINDS:
        raise UnknownNameError("instance kind", options.instance_kind, INSTANCE_KINDS)
    for what, value, least in (
        ("max_batch_size", options.max_batch_size, 1),
        ("instances", options.instances, 1),
        ("queue_delay", options.queue_delay, 0),
    ):
        if value < least:
            raise InputError(f"{what} {value}: expected at least {least}")
    outside = [size for size in options.preferred_batch_sizes if not 1 <= size <= options.max_batch_size]
    if outside:
        raise InputError(f"preferred batch size {outside[0]}: expected 1 to max_batch_size, {options.max_batch_size}")
    if options.tensorrt and (options.backend != "onnxruntime" or options.instance_kind == "cpu"):
        raise InputError("tensorrt runs on a GPU with the onnxruntime backend: choose these, or leave tensorrt out")
    if options.tensorrt_cache is not None and not options.tensorrt:
        raise InputError("tensorrt_cache has no use without tensorrt: add it, or leave the cache out")
