"""`compress-uq export`: a bundle's ONNX file again, in another sampling mode."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import compress_uq as cuq
from compress_uq_cli import options as o
from compress_uq_cli.console import note, print_json

__all__ = ["export"]


def export(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    sampling: Annotated[str, typer.Option(help="fixed, seeded (a seed per image) or random.")] = "fixed",
    arch: o.Arch = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
) -> None:
    """Export a bundle's model; every gate is passed before the file is put in place."""
    if out.exists() and not overwrite:
        raise cuq.InputError(f"{out} exists: pass --overwrite to replace it, or another --out")
    result = cuq.Bundle.load(bundle, arch=arch).export_onnx(out, sampling=sampling)
    note(f"{out}: {result.size_bytes:,} bytes, sampling {sampling}, {len(result.gates)} gates passed")
    if json:
        print_json({"path": str(out), "size_bytes": result.size_bytes, "gates": dict(result.gates)})
