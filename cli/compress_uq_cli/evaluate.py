"""`compress-uq evaluate`: the figures of a checkpoint, a bundle or an exported file on any data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import compress_uq as cuq
from compress_uq_cli import options as o
from compress_uq_cli.console import print_json, progress, show_table

__all__ = ["evaluate"]


def evaluate(
    artifact: Annotated[Path, typer.Argument(help="A checkpoint or state dict, a bundle, or an .onnx file.")],
    arch: o.Arch = None,
    arch_option: o.ArchOption = None,
    num_classes: o.NumClasses = None,
    data: o.Data = None,
    data_root: o.DataRoot = Path("data"),
    mean: o.Mean = None,
    std: o.Std = None,
    ood: o.Ood = None,
    batch_size: o.BatchSize = None,
    workers: o.Workers = None,
    device: o.Device = None,
    json: o.Json = False,
    unsafe_load: o.UnsafeLoad = False,
) -> None:
    """Measure a model on a test split; of data whose test split a calibration used, only the rest."""
    where: dict[str, Any] = {"root": data_root, "ood": ood or ()}
    normalisation: dict[str, Any] = {"mean": o.numbers(mean, "--mean"), "std": o.numbers(std, "--std")}
    model: Any
    if artifact.is_dir() or artifact.suffix == ".onnx":
        onnx = artifact / "model.onnx" if artifact.is_dir() else artifact
        if artifact.is_dir():
            cuq.verify_files(artifact)
        model = cuq.OnnxPredictor(onnx)
        splits = cuq.load_recorded_data(model, data, **where, **normalisation)
    else:
        opened = cuq.open_model_and_data(
            artifact,
            arch=arch,
            options=o.arch_options(arch_option),
            num_classes=num_classes,
            data=data,
            unsafe=unsafe_load,
            reserve=False,
            **where,
            **normalisation,
        )
        model, splits = list(opened.checkpoint.models), opened.splits
    with progress() as callback:
        measured = cuq.evaluate(
            model, splits, device=device or "auto", batch_size=batch_size, workers=workers or 0, progress=callback
        )
    rows = [[name, f"{f.value:.4f}", f"[{f.low:.4f}, {f.high:.4f}]"] for name, f in measured.metrics.items()]
    rows += [
        [f"OOD {name} {kind}", f"{f.value:.4f}", f"[{f.low:.4f}, {f.high:.4f}]"]
        for name, figures in measured.ood.items()
        for kind, f in figures.items()
    ]
    rows += [[n, f"{f.value:.4f}", f"[{f.low:.4f}, {f.high:.4f}]"] for n, f in measured.decisions.items()]
    show_table(f"{artifact} on {splits.info.name}, {len(measured.labels)} images", ["", "value", "95 %"], rows)
    if json:
        print_json(measured.to_json())
