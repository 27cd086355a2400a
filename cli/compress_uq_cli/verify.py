"""`compress-uq verify`: does an artifact still keep its promises."""

from __future__ import annotations

from collections.abc import Mapping
from json import loads
from pathlib import Path
from typing import Annotated, Any

import typer

import compress_uq as cuq
from compress_uq_cli import options as o
from compress_uq_cli.console import note, print_json, progress, show_table

__all__ = ["verify"]

_WORDS = {True: "yes", False: "NO", None: "-"}


def verify(
    bundle: Annotated[Path, typer.Argument(help="A bundle, or an .onnx file.")],
    data: o.Data = None,
    data_root: o.DataRoot = Path("data"),
    mean: o.Mean = None,
    std: o.Std = None,
    ood: o.Ood = None,
    arch: o.Arch = None,
    json: o.Json = False,
) -> None:
    """Check hashes, every gate and parity with torch, and with --data the card; exit 2 when something does not hold."""
    splits = None
    if data is not None:
        normalisation = {"mean": o.numbers(mean, "--mean"), "std": o.numbers(std, "--std")}
        splits = _splits(bundle, data, ood, arch, {"root": data_root, **normalisation})
    try:
        with progress() as callback:
            result = cuq.verify(bundle, data=splits, arch=arch, progress=callback)
    except cuq.errors.VerificationError as error:
        _show(bundle, error.checks, "does not hold", json)
        raise
    _show(bundle, result.checks, "holds", json)
    if splits is None and bundle.is_dir():
        note("The card was not measured again: pass --data for that.")


def _splits(bundle: Path, data: str, ood: list[str] | None, arch: str | None, where: Mapping[str, Any]) -> cuq.Splits:
    """The data that the card was measured on, its out-of-distribution sets among them where their names tell enough."""
    if not bundle.is_dir():
        raise cuq.InputError(f"{bundle} has no report card beside it: give its bundle, or measure it with evaluate")
    cuq.verify_files(bundle)
    card = loads((bundle / "report.json").read_bytes())
    if "recalibration" in card["recipe"]:
        return cuq.load_new_data(cuq.Bundle.load(bundle, arch=arch), data, **where)
    known = {*cuq.data.DATASETS.names, *cuq.data.MADE_SETS.names}
    recorded = [name for name in card["onnx"]["ood"] if name in known]
    file = cuq.OnnxPredictor(bundle / "model.onnx")
    return cuq.load_recorded_data(file, data, ood=ood or recorded, **where)


def _show(bundle: Path, checks: Mapping[str, Any], said: str, json: bool) -> None:
    rows = [[name, _WORDS[check.held], check.found] for name, check in checks.items()]
    show_table(f"{bundle} {said}", ["check", "held", "found"], rows)
    if json:
        print_json({name: vars(check) for name, check in checks.items()})
