"""`compress-uq verify`: does an artifact still keep its promises."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import compress_uq as cuq
from compress_uq_cli import options as o
from compress_uq_cli.console import print_json, show_table

__all__ = ["verify"]


def verify(
    bundle: Annotated[Path, typer.Argument(help="A bundle, or an .onnx file.")],
    arch: o.Arch = None,
    json: o.Json = False,
) -> None:
    """Check hashes, operators, parity with torch, batch independence and sampling; exit 2 when something fails."""
    result = cuq.verify(bundle, arch=arch)
    show_table(f"{bundle} holds", ["check", "found"], [[name, found] for name, found in result.checks.items()])
    if json:
        print_json(dict(result.checks))
