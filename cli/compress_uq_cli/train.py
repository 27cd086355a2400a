"""`compress-uq train`: a dense model, so that there is something to prune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import compress_uq as cuq
from compress_uq_cli import options as o
from compress_uq_cli.console import note, print_json, progress
from compress_uq_cli.groups import TrainingOptions, grouped

__all__ = ["train"]


@grouped
def train(
    arch: Annotated[
        str, typer.Option(help="compress-uq:NAME, torchvision:NAME, timm:NAME or package.module:callable.")
    ],
    data: Annotated[
        str, typer.Option(help="A data set's name, a folder of class folders, or package.module:callable.")
    ],
    out: Annotated[Path, typer.Option(help="The checkpoint to write, such as model.pt.")],
    *,
    arch_option: o.ArchOption = None,
    uq: Annotated[str, typer.Option(help="Train with this uncertainty method in place; see `methods`.")] = "msp",
    uq_option: o.UqOption = None,
    samples: Annotated[int | None, typer.Option(help="Models of an ensemble, at least 2.")] = None,
    dropout: o.Dropout = None,
    dropout_at: o.DropoutAt = None,
    trained: TrainingOptions,
    optimizer: Annotated[str | None, typer.Option(help="sgd or adam.")] = None,
    data_root: o.DataRoot = Path("data"),
    mean: o.Mean = None,
    std: o.Std = None,
    overwrite: o.Overwrite = False,
    config: o.Config = None,
    json: o.Json = False,
) -> None:
    """Train a dense model; a tenth of the training set is held out for calibration and recorded."""
    if out.exists() and not overwrite:
        raise cuq.InputError(f"{out} exists: pass --overwrite to replace it, or another --out")
    if not out.parent.is_dir():
        raise cuq.InputError(f"--out {out}: the folder {out.parent} is not there")
    method = o.method(
        uq,
        o.given(samples=samples, dropout=dropout, dropout_at=dropout_at, seed=trained.seed),
        o.pairs(uq_option, "--uq-option"),
    )
    training = trained.config(optimizer=optimizer)
    with progress() as callback:
        results, splits = cuq.train_dense(
            out,
            arch=arch,
            data=data,
            uq=method,
            options=o.arch_options(arch_option),
            root=data_root,
            mean=o.numbers(mean, "--mean"),
            std=o.numbers(std, "--std"),
            training=training,
            progress=callback,
        )
        models = [result.model for result in results]
        measured = cuq.evaluate(models, splits, progress=callback) if splits.test is not None else None
    accuracy = None if measured is None else measured.metrics["accuracy"].value
    shown = "" if accuracy is None else f", test accuracy {accuracy:.4f}"
    several = f", {len(results)} models" if len(results) > 1 else ""
    note(f"{out}: {arch} on {data}{several}{shown}")
    if method.training_note:
        note(f"note: {method.training_note}")
    if json:
        history = [vars(epoch) for result in results for epoch in result.history]
        print_json({"out": str(out), "accuracy": accuracy, "history": history})
