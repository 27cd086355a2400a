"""`compress-uq export`: a bundle's ONNX file again, in another sampling mode, precision or input layout."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import compress_uq as cuq
from compress_uq_cli import options as o
from compress_uq_cli.console import note, print_json, progress, show_table

__all__ = ["export"]


@dataclass(frozen=True)
class _Wanted:
    """What is written, and in which form."""

    bundle: cuq.Bundle
    out: Path
    sampling: str
    precision: str
    quantization: str
    input: str
    resize: tuple[int, int] | None


def export(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    sampling: Annotated[str, typer.Option(help="fixed, seeded (a seed per image) or random.")] = "fixed",
    precision: Annotated[str, typer.Option(help="fp32, fp16 or int8.")] = "fp32",
    quantization: Annotated[
        str, typer.Option(help="Of int8: cpu (uint8 activations) or tensorrt (symmetric int8).")
    ] = "cpu",
    layout: Annotated[
        str, typer.Option("--input", help="float32-nchw, normalised, or uint8-nhwc, pixels.")
    ] = "float32-nchw",
    resize: Annotated[
        str | None,
        typer.Option(help="HEIGHTxWIDTH of the pixels that are fed; the graph brings them to the model's size."),
    ] = None,
    data: o.Data = None,
    data_root: o.DataRoot = Path("data"),
    require: Annotated[
        list[str] | None,
        typer.Option(help="METRIC<=NUMBER or METRIC>=NUMBER of the file on the test split; unmet: exit 1; repeatable."),
    ] = None,
    arch: o.Arch = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
) -> None:
    """Export a bundle's model; every gate is passed before the file is put in place.

    With --data or --require the file is measured beside the float32 one, on images that calibrate nothing; fp16 and
    int8 are calibrated again on theirs.
    """
    if out.exists() and not overwrite:
        raise cuq.InputError(f"{out} exists: pass --overwrite to replace it, or another --out")
    requirements = [cuq.Requirement.parse(text) for text in require or ()]
    wanted = _Wanted(cuq.Bundle.load(bundle, arch=arch), out, sampling, precision, quantization, layout, _size(resize))
    splits = _splits(wanted, data, data_root, measured=bool(data or requirements))
    with progress() as callback:
        result = _export(wanted, splits, out, callback)
        card = None if splits is None else _compared(wanted, splits, callback)
    again = f", fitted again: {', '.join(result.refitted)}" if result.refitted else ""
    note(
        f"{out}: {result.size_bytes:,} bytes, {precision}, sampling {sampling}, {len(result.gates)} gates passed{again}"
    )
    if card is not None and splits is not None:
        show_table(f"{out} on {splits.info.name}", ["", *card.columns], card.rows())
    if json:
        print_json(_json(out, result, card))
    unmet = [] if card is None else card.unmet(list(card.columns)[-1], requirements)
    if unmet:
        raise cuq.errors.RequirementNotMetError(f"--require is not met: {'; '.join(unmet)} (the file is kept in {out})")


def _splits(wanted: _Wanted, data: str | None, root: Path, *, measured: bool) -> cuq.Splits | None:
    """Images that calibrate and measure, where either is done; the bundle's own data by default."""
    if not measured and wanted.precision == "fp32":
        return None
    name = data or wanted.bundle.origin.data
    if name is None or (data is None and (":" in name or name not in cuq.data.DATASETS)):
        if not measured and wanted.precision == "fp16":
            note("note: without --data fp16 keeps the calibration that was fitted in fp32")
            return None
        raise cuq.InputError("the bundle's data are not found by themselves: pass --data with their name or folder")
    return cuq.load_new_data(wanted.bundle, name, root=root)


def _export(wanted: _Wanted, splits: cuq.Splits | None, out: Path, callback: Any) -> Any:
    return wanted.bundle.export_onnx(
        out,
        sampling=wanted.sampling,
        precision=wanted.precision,
        quantization=wanted.quantization,
        input=wanted.input,
        resize=wanted.resize,
        splits=splits,
        progress=callback,
    )


def _compared(wanted: _Wanted, splits: cuq.Splits, callback: Any) -> Any:
    """The bundle's own float32 file and the one just written, on the test split."""
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "model.onnx"
        reference.write_bytes(wanted.bundle.onnx)
        name = wanted.precision if wanted.precision != "fp32" else "exported"
        return cuq.compare_precisions({"fp32": reference, name: wanted.out}, splits, progress=callback)


def _size(text: str | None) -> tuple[int, int] | None:
    """Height and width.

    Raises:
        InputError: something else.
    """
    if text is None:
        return None
    height, found, width = text.partition("x")
    if not (found and height.isdecimal() and width.isdecimal()):
        raise cuq.InputError(f"--resize {text!r}: expected HEIGHTxWIDTH, such as 256x256")
    return int(height), int(width)


def _json(out: Path, result: Any, card: Any) -> dict[str, Any]:
    content = {"path": str(out), "size_bytes": result.size_bytes, "gates": dict(result.gates)}
    content["refitted"] = list(result.refitted)
    return content if card is None else {**content, "card": card.to_json()}
