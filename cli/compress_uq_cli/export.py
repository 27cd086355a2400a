"""`compress-uq export`: a bundle's ONNX file again, in another form, or as a model of a Triton server."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

import compress_uq as cuq
from compress_uq_cli import options as o
from compress_uq_cli.console import note, print_json, progress, show_table
from compress_uq_cli.groups import grouped

__all__ = ["export"]


@dataclass(frozen=True)
class FormOptions:
    """In which form a file is written; the defaults are the form of a bundle's model.onnx."""

    sampling: Annotated[str, typer.Option(help="fixed, seeded (a seed per image) or random.")] = "fixed"
    precision: Annotated[str, typer.Option(help="fp32, fp16 or int8.")] = "fp32"
    quantization: Annotated[
        str, typer.Option(help="Of int8: cpu (uint8 activations) or tensorrt (symmetric int8).")
    ] = "cpu"
    layout: Annotated[
        str | None, typer.Option(help="Of the samples: auto (what measures cheaper), fold or unroll.")
    ] = None
    max_memory: Annotated[
        str | None, typer.Option(help="What a process that runs the file may take, such as 900MB or 1.5GiB.")
    ] = None
    input: Annotated[str, typer.Option(help="float32-nchw, normalised, or uint8-nhwc, pixels.")] = "float32-nchw"
    resize: Annotated[
        str | None,
        typer.Option(help="HEIGHTxWIDTH of the pixels that are fed; the graph brings them to the model's size."),
    ] = None

    def arguments(self) -> dict[str, Any]:
        """As `Bundle.export_onnx` takes them."""
        return {**vars(self), "layout": self.layout or "auto", "resize": _size(self.resize)}


@dataclass(frozen=True)
class ServingOptions:
    """How Triton serves the file; None leaves a default as it is."""

    name: Annotated[str | None, typer.Option(help="triton: the model's name on the server.")] = None
    backend: Annotated[str | None, typer.Option(help="triton: onnxruntime or python.")] = None
    max_batch_size: Annotated[int | None, typer.Option(help="triton: images in one execution.")] = None
    preferred_batch_sizes: Annotated[str | None, typer.Option(help="triton: comma-separated.")] = None
    queue_delay: Annotated[int | None, typer.Option(help="triton: microseconds a request may wait.")] = None
    instances: Annotated[int | None, typer.Option(help="triton: copies that run side by side.")] = None
    instance_kind: Annotated[str | None, typer.Option(help="triton: auto, gpu or cpu.")] = None
    tensorrt: Annotated[bool | None, typer.Option("--tensorrt", help="triton: run through TensorRT.")] = None
    tensorrt_cache: Annotated[str | None, typer.Option(help="triton: the server's folder for built engines.")] = None
    warm_up: Annotated[bool | None, typer.Option("--warm-up/--no-warm-up", help="triton: run before ready.")] = None

    def given(self) -> dict[str, Any]:
        """What was given."""
        return o.given(**vars(self))

    def options(self) -> cuq.TritonOptions:
        """As `export_triton` takes them."""
        given = self.given()
        if self.preferred_batch_sizes is not None:
            given["preferred_batch_sizes"] = _sizes(self.preferred_batch_sizes)
        return cuq.TritonOptions(**given)


@grouped
def export(
    bundle: Annotated[Path, typer.Argument(help="A bundle; with --to triton also an exported .onnx file.")],
    out: Annotated[Path, typer.Option(help="The file to write; with --to triton the model repository.")],
    form: FormOptions,
    serving: ServingOptions,
    to: Annotated[str, typer.Option(help="onnx or triton.")] = "onnx",
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
    _refuse(to, out, serving, overwrite)
    if to == "triton" and (bundle.is_file() or (form == FormOptions() and not (data or require))):
        result = _serve_as_it_stands(bundle, out, form, arch, serving.options(), overwrite)
        note(f"{result.path}: {result.size_bytes:,} bytes, {len(result.gates)} gates passed")
        if json:
            print_json(_json(result.path, result, None))
        return
    requirements = [cuq.Requirement.parse(text) for text in require or ()]
    arguments, served = form.arguments(), serving.options()
    loaded = cuq.Bundle.load(bundle, arch=arch)
    splits = _splits(loaded, form.precision, data, data_root, measured=bool(data or requirements))
    with tempfile.TemporaryDirectory() as folder:
        file = out if to == "onnx" else Path(folder) / "model.onnx"
        with progress() as callback:
            result = loaded.export_onnx(file, **arguments, splits=splits, on_cost=_show_costs, progress=callback)
            card = None if splits is None else _compared(loaded, form.precision, file, splits, callback)
        if to == "triton":
            placed = cuq.export_triton(file, out, options=served, overwrite=overwrite)
            result = replace(result, path=placed.path, size_bytes=placed.size_bytes)
    again = f", fitted again: {', '.join(result.refitted)}" if result.refitted else ""
    said = f"{form.precision}, sampling {form.sampling}"
    note(f"{result.path}: {result.size_bytes:,} bytes, {said}, {len(result.gates)} gates passed{again}")
    if card is not None and splits is not None:
        show_table(f"{result.path} on {splits.info.name}", ["", *card.columns], card.rows())
    if json:
        print_json(_json(result.path, result, card))
    unmet = [] if card is None else card.unmet(list(card.columns)[-1], requirements)
    if unmet:
        raise cuq.errors.RequirementNotMetError(
            f"--require is not met: {'; '.join(unmet)} (the file is kept in {result.path})"
        )


def _refuse(to: str, out: Path, serving: ServingOptions, overwrite: bool) -> None:
    if to not in ("onnx", "triton"):
        raise cuq.errors.UnknownNameError("exporter", to, ("onnx", "triton"))
    if to == "onnx" and serving.given():
        option = "--" + next(iter(serving.given())).replace("_", "-")
        raise cuq.InputError(f"{option} is for a server: add --to triton, or leave it out")
    if to == "onnx" and out.exists() and not overwrite:
        raise cuq.InputError(f"{out} exists: pass --overwrite to replace it, or another --out")


def _serve_as_it_stands(
    artifact: Path, out: Path, form: FormOptions, arch: str | None, options: cuq.TritonOptions, overwrite: bool
) -> Any:
    """A bundle's own file, or one that was exported before; no torch model is needed."""
    if not artifact.is_file():
        return cuq.Bundle.load(artifact, arch=arch).export_triton(out, options=options, overwrite=overwrite)
    if form != FormOptions():
        raise cuq.InputError(f"{artifact} stays as it was exported: for another form give its bundle instead")
    return cuq.export_triton(artifact, out, options=options, overwrite=overwrite)


def _sizes(given: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in given.split(","))
    except ValueError as error:
        raise cuq.InputError(f"--preferred-batch-sizes {given}: expected numbers such as 8,16,32") from error


def _splits(bundle: cuq.Bundle, precision: str, data: str | None, root: Path, *, measured: bool) -> cuq.Splits | None:
    """Images that calibrate and measure, where either is done; the bundle's own data by default."""
    if not measured and precision == "fp32":
        return None
    name = o.named_data(bundle, data)
    if name is None:
        if not measured and precision == "fp16":
            note("note: without --data fp16 keeps the calibration that was fitted in fp32")
            return None
        raise cuq.InputError("the bundle's data are not found by themselves: pass --data with their name or folder")
    return cuq.load_new_data(bundle, name, root=root)


def _show_costs(costs: Any) -> None:
    show_table("cost of one thread, by batch", costs.columns, costs.rows())
    note(f"layout {costs.chosen}: {costs.reason}")


def _compared(bundle: cuq.Bundle, precision: str, file: Path, splits: cuq.Splits, callback: Any) -> Any:
    """The bundle's own float32 file and the one just written, on the test split."""
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "model.onnx"
        reference.write_bytes(bundle.onnx)
        name = precision if precision != "fp32" else "exported"
        return cuq.compare_precisions({"fp32": reference, name: file}, splits, progress=callback)


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
    content: dict[str, Any] = {"path": str(out), "size_bytes": result.size_bytes, "gates": dict(result.gates)}
    content["refitted"] = list(result.refitted)
    content |= {"layout": result.layout, "costs": None if result.costs is None else result.costs.to_json()}
    return content if card is None else {**content, "card": card.to_json()}
