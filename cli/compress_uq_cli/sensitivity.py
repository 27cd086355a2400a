"""`compress-uq sensitivity`: how much each layer of a model bears."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import compress_uq as cuq
from compress_uq_cli import options as o
from compress_uq_cli.console import note, print_json, progress, show_table
from compress_uq_cli.groups import InputOptions, grouped

__all__ = ["sensitivity"]


@grouped
def sensitivity(
    model: Annotated[Path, typer.Argument(help="Checkpoint, state dict (with --arch) or, unsafely, a pickled model.")],
    *,
    ratios: Annotated[
        str, typer.Option(help="Shares of a layer's channels to remove, comma-separated.")
    ] = "0.25,0.5,0.75",
    criterion: Annotated[str, typer.Option(help="Which channels go; see `methods`.")] = "l1",
    keep: Annotated[
        list[str] | None, typer.Option(help="Layers to leave out: a name, pattern or type; repeatable.")
    ] = None,
    calibration: Annotated[str, typer.Option(help="Calibrator, or auto; see `methods`.")] = "temperature",
    batch_size: o.BatchSize = None,
    workers: o.Workers = None,
    seed: o.Seed = None,
    device: o.Device = None,
    inputs: InputOptions,
    out: Annotated[Path | None, typer.Option(help="Folder; by default the model's stem with -sensitivity.")] = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    unsafe_load: o.UnsafeLoad = False,
) -> None:
    """Prune one group of channels at a time and measure it on held-out images, without fine-tuning."""
    destination = out or Path(f"{model.stem}-sensitivity")
    cuq.Bundle.refuse_existing(destination, overwrite=overwrite)
    opened = inputs.open(model, unsafe=unsafe_load)
    training = cuq.TrainingConfig(**o.given(batch_size=batch_size, workers=workers, seed=seed, device=device))
    with progress() as callback:
        found = cuq.sensitivity(
            opened.checkpoint.model,
            opened.splits,
            ratios=o.numbers(ratios, "--ratios") or (),
            pruning={"criterion": criterion, "keep": tuple(keep or ())},
            calibration=calibration,
            training=training,
            progress=callback,
        )
        found.save(destination, overwrite=overwrite)
    measures = list(found.dense)
    rows = [["none", "", "", *(f"{value:.4f}" for value in found.dense.values())]]
    rows += [
        [trial.layer, str(trial.channels), f"{trial.ratio:g}", *(f"{trial.measures[name]:.4f}" for name in measures)]
        for trial in found.trials
    ]
    show_table("Sensitivity", ["layer", "channels", "removed", *measures], rows)
    note(f"The table and its plot are in {destination}/.")
    if json:
        print_json(found.to_json())
