"""`compress-uq benchmark`: what a bundle costs where it runs, beside the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import compress_uq as cuq
from compress_uq_cli import options as o
from compress_uq_cli.console import note, print_json, progress, show_table

__all__ = ["benchmark"]

_FILES = ("benchmark.json", "benchmark.md", "benchmark.png")


def benchmark(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    batch_sizes: Annotated[str, typer.Option(help="Images in one call, comma-separated.")] = "1,32",
    threads: Annotated[str, typer.Option(help="Threads inside one call, comma-separated.")] = "1",
    precision: Annotated[str, typer.Option(help="fp32, fp16, int8, comma-separated.")] = "fp32",
    quantization: Annotated[str, typer.Option(help="Of int8: cpu or tensorrt.")] = "cpu",
    layout: Annotated[str | None, typer.Option(help="fold, unroll, comma-separated; default: all there are.")] = None,
    providers: Annotated[str | None, typer.Option(help="cpu, cuda, tensorrt; default: those that are there.")] = None,
    rounds: Annotated[int, typer.Option(help="How often each alternative runs.")] = 30,
    clock: Annotated[str, typer.Option(help="wall, or cpu: the work of this thread alone.")] = "wall",
    dense: Annotated[Path | None, typer.Option(help="The dense model's file, where the bundle does not tell.")] = None,
    arch: o.Arch = None,
    data: o.Data = None,
    data_root: o.DataRoot = Path("data"),
    out: Annotated[Path | None, typer.Option(help="A folder for benchmark.json, .md and .png.")] = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
) -> None:
    """Time the compressed model, the dense one, and T eager passes of it, in turns; one row for each.

    On a machine that other programs share, --clock cpu counts only the work that was done here.
    """
    if out is not None and out.exists() and not out.is_dir():
        raise cuq.InputError(f"--out {out} is a file: name a folder")
    if out is not None and not overwrite:
        there = next((out / name for name in _FILES if (out / name).exists()), None)
        if there is not None:
            raise cuq.InputError(f"{there} exists: pass --overwrite to replace it, or another --out")
    sizes, counts = _numbers(batch_sizes, "--batch-sizes"), _numbers(threads, "--threads")
    loaded = cuq.Bundle.load(bundle, arch=arch)
    precisions = precision.split(",")
    with progress() as callback:
        result = cuq.benchmark(
            loaded, dense=_dense(dense, arch, loaded), arch=arch, batch_sizes=sizes, threads=counts,
            precisions=precisions, layouts=None if layout is None else layout.split(","), quantization=quantization,
            providers=None if providers is None else providers.split(","), rounds=rounds, clock=clock,
            splits=_splits(loaded, data, data_root) if "int8" in precisions else None, progress=callback,
        )  # fmt: skip
    show_table(f"{bundle}, T = {result.samples}", result.columns, result.table())
    for text in result.notes:
        note(f"note: {text}")
    if out is not None:
        result.save(out)
        note(f"{out}: {', '.join(_FILES)}")
    if json:
        print_json(result.to_json())
    failed = [row for row in result.rows if row.failure is not None]
    if failed:
        raise cuq.errors.MissingDependencyError(
            f"{len(failed)} of {len(result.rows)} rows were not timed, the first {failed[0].name} on "
            f"{failed[0].provider}: {failed[0].failure}"
        )


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise cuq.InputError(f"{option} {text!r}: expected whole numbers separated by commas") from error


def _dense(path: Path | None, arch: str | None, bundle: cuq.Bundle) -> Any:
    """The dense model of a file, shaped as the bundle's images where the file does not tell."""
    if path is None:
        return None
    origin = bundle.origin
    classes = None if origin.labels is None else len(origin.labels)
    return cuq.load_model(path, arch=arch, num_classes=classes, input_shape=origin.input_shape)


def _splits(bundle: cuq.Bundle, data: str | None, root: Path) -> cuq.Splits:
    name = o.named_data(bundle, data)
    if name is None:
        raise cuq.InputError("int8 takes its ranges from images: pass --data with their name or folder")
    return cuq.load_new_data(bundle, name, root=root)
