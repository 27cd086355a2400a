"""`compress-uq calibrate`: a bundle calibrated again on newer data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import compress_uq as cuq
from compress_uq_cli import options as o
from compress_uq_cli.console import console, note, print_json, progress, show_table

__all__ = ["calibrate"]


def calibrate(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    data: Annotated[str, typer.Option(help="The newer data: a data set's name, a folder, or package.module:callable.")],
    calibration: Annotated[
        str | None, typer.Option(help="Calibrator, or auto; by default the bundle's own. See `methods`.")
    ] = None,
    data_root: o.DataRoot = Path("data"),
    mean: o.Mean = None,
    std: o.Std = None,
    arch: o.Arch = None,
    device: o.Device = None,
    out: Annotated[
        Path | None, typer.Option(help="The new bundle; by default the old one's name with -recalibrated.")
    ] = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
) -> None:
    """Calibrate a bundle again on newer data: a new bundle with the same weights, and what changed."""
    destination = out or Path(f"{bundle.resolve().name}-recalibrated")
    if destination.resolve() == bundle.resolve():
        raise cuq.InputError(f"--out {destination} is the bundle that is read: choose another")
    cuq.Bundle.refuse_existing(destination, overwrite=overwrite)
    if calibration is not None:
        cuq.calibration.check_name(calibration)
    old = cuq.Bundle.load(bundle, arch=arch)
    splits = cuq.load_new_data(old, data, root=data_root, mean=o.numbers(mean, "--mean"), std=o.numbers(std, "--std"))
    with progress() as callback:
        new = cuq.recalibrate(old, splits, method=calibration, device=device or "auto", progress=callback)
        new.save(destination, overwrite=overwrite)
    report = new.report.to_json()
    _show_change(report["recalibration"])
    for warning in report["warnings"]:
        console.print(f"warning: {warning}", style="yellow", markup=False)
    note(f"The bundle is in {destination}/: the same weights, calibrated on {splits.info.calibration}.")
    if json:
        print_json(report)


def _show_change(changed: dict[str, Any]) -> None:
    before, after = changed["before"], changed["after"]
    rows = [["calibration", before["calibration"], after["calibration"]]]
    rows += [
        [name, *(f"{c[name]['value']:.4f} [{c[name]['low']:.4f}, {c[name]['high']:.4f}]" for c in (before, after))]
        for name in before
        if name != "calibration"
    ]
    show_table(f"Calibrated again on {changed['data']}", ["", "before", "after"], rows)
