"""`compress-uq export`: a bundle's ONNX file again, in another sampling mode, or as a model of a Triton server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

import compress_uq as cuq
from compress_uq_cli import options as o
from compress_uq_cli.console import note, print_json

__all__ = ["export"]


def export(
    bundle: Annotated[Path, typer.Argument(help="A bundle; with --to triton also an exported .onnx file.")],
    out: Annotated[Path, typer.Option(help="The file to write; with --to triton the model repository.")],
    to: Annotated[str, typer.Option(help="onnx or triton.")] = "onnx",
    sampling: Annotated[str, typer.Option(help="fixed, seeded (a seed per image) or random.")] = "fixed",
    name: Annotated[str | None, typer.Option(help="triton: the model's name on the server.")] = None,
    backend: Annotated[str | None, typer.Option(help="triton: onnxruntime or python.")] = None,
    max_batch_size: Annotated[int | None, typer.Option(help="triton: images in one execution.")] = None,
    preferred_batch_sizes: Annotated[str | None, typer.Option(help="triton: comma-separated.")] = None,
    queue_delay: Annotated[int | None, typer.Option(help="triton: microseconds a request may wait.")] = None,
    instances: Annotated[int | None, typer.Option(help="triton: copies that run side by side.")] = None,
    instance_kind: Annotated[str | None, typer.Option(help="triton: auto, gpu or cpu.")] = None,
    tensorrt: Annotated[bool | None, typer.Option("--tensorrt", help="triton: run through TensorRT.")] = None,
    tensorrt_cache: Annotated[str | None, typer.Option(help="triton: the server's folder for built engines.")] = None,
    warm_up: Annotated[bool | None, typer.Option("--warm-up/--no-warm-up", help="triton: run before ready.")] = None,
    arch: o.Arch = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
) -> None:
    """Export a bundle's model; every gate is passed before anything is put in place."""
    given: dict[str, Any] = {
        "name": name,
        "backend": backend,
        "max_batch_size": max_batch_size,
        "preferred_batch_sizes": None if preferred_batch_sizes is None else _sizes(preferred_batch_sizes),
        "queue_delay": queue_delay,
        "instances": instances,
        "instance_kind": instance_kind,
        "tensorrt": tensorrt,
        "tensorrt_cache": tensorrt_cache,
        "warm_up": warm_up,
    }
    serving = {key: value for key, value in given.items() if value is not None}
    if to not in _WRITERS:
        raise cuq.errors.UnknownNameError("exporter", to, _WRITERS)
    result = _WRITERS[to](bundle, out, sampling, arch, serving, overwrite)
    note(f"{result.path}: {result.size_bytes:,} bytes, sampling {sampling}, {len(result.gates)} gates passed")
    if json:
        print_json({"path": str(result.path), "size_bytes": result.size_bytes, "gates": dict(result.gates)})


def _to_onnx(bundle: Path, out: Path, sampling: str, arch: str | None, serving: dict[str, Any], overwrite: bool) -> Any:
    if serving:
        option = "--" + next(iter(serving)).replace("_", "-")
        raise cuq.InputError(f"{option} is for a server: add --to triton, or leave it out")
    if out.exists() and not overwrite:
        raise cuq.InputError(f"{out} exists: pass --overwrite to replace it, or another --out")
    return cuq.Bundle.load(bundle, arch=arch).export_onnx(out, sampling=sampling)


def _to_triton(
    artifact: Path, out: Path, sampling: str, arch: str | None, serving: dict[str, Any], overwrite: bool
) -> Any:
    options = cuq.TritonOptions(**serving)
    if not artifact.is_file():
        loaded = cuq.Bundle.load(artifact, arch=arch)
        return loaded.export_triton(out, sampling=sampling, options=options, overwrite=overwrite)
    if sampling != "fixed":
        raise cuq.InputError(f"--sampling {sampling}: {artifact} samples as it was exported; give its bundle instead")
    return cuq.export_triton(artifact, out, options=options, overwrite=overwrite)


def _sizes(given: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in given.split(","))
    except ValueError as error:
        raise cuq.InputError(f"--preferred-batch-sizes {given}: expected numbers such as 8,16,32") from error


_WRITERS: dict[str, Callable[..., Any]] = {"onnx": _to_onnx, "triton": _to_triton}
