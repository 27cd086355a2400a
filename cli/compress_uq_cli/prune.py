"""`compress-uq prune`: the main job."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import compress_uq as cuq
from compress_uq_cli import options as o
from compress_uq_cli.console import console, note, print_json, progress, show_table
from compress_uq_cli.inputs import open_model_and_data

__all__ = ["prune", "show_card"]


def prune(
    model: Annotated[Path, typer.Argument(help="Checkpoint, state dict (with --arch) or, unsafely, a pickled model.")],
    sparsity: Annotated[float, typer.Option(help="Share of each layer's channels to remove, above 0 and below 1.")],
    criterion: Annotated[str, typer.Option(help="Which channels go; see `methods`.")] = "l1",
    round_to: Annotated[int, typer.Option(help="Channels kept are a multiple of this.")] = 8,
    uq: Annotated[str, typer.Option(help="Uncertainty method; see `methods`.")] = "mc-dropout",
    samples: Annotated[int | None, typer.Option(help="Members per prediction, at least 1.")] = None,
    sampling_budget: Annotated[
        float | None, typer.Option(help="What all members may cost, as a share of one dense pass in MACs.")
    ] = None,
    dropout: Annotated[float | None, typer.Option(help="Dropout rate, above 0 and below 1.")] = None,
    dropout_at: Annotated[str | None, typer.Option(help="auto, or modules to drop after: names or patterns.")] = None,
    calibration: Annotated[str, typer.Option(help="Calibrator; see `methods`.")] = "temperature",
    epochs: o.Epochs = None,
    lr: o.LearningRate = None,
    batch_size: o.BatchSize = None,
    augment: o.Augment = None,
    class_weights: o.ClassWeights = None,
    workers: o.Workers = None,
    seed: o.Seed = None,
    device: o.Device = None,
    arch: o.Arch = None,
    arch_option: o.ArchOption = None,
    num_classes: o.NumClasses = None,
    data: o.Data = None,
    data_root: o.DataRoot = Path("data"),
    mean: o.Mean = None,
    std: o.Std = None,
    ood: o.Ood = None,
    out: Annotated[Path | None, typer.Option(help="The bundle; by default the model's stem with -compressed.")] = None,
    overwrite: o.Overwrite = False,
    config: o.Config = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, its sites and cost, and stop.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep training state beside the output, and go on from what is there.")
    ] = False,
    control: Annotated[
        bool, typer.Option("--control", help="Also fine-tune the dense model, to tell pruning's own effect.")
    ] = False,
    require: Annotated[
        list[str] | None, typer.Option(help="A bound on the exported file, such as 'ece<=0.03'; repeatable.")
    ] = None,
    json: o.Json = False,
    unsafe_load: o.UnsafeLoad = False,
) -> None:
    """Prune, fine-tune, calibrate and bundle a trained classifier, its report card and a verified model.onnx."""
    target = out or Path(f"{model.stem}-compressed")
    requirements = [cuq.Requirement.parse(text) for text in require or ()]
    cuq.Bundle.refuse_existing(target, overwrite=overwrite or dry_run)
    method = _method(uq, o.given(samples=samples, sampling_budget=sampling_budget, p=dropout, at=dropout_at, seed=seed))
    training = cuq.TrainingConfig(
        **o.given(
            epochs=epochs,
            lr=lr,
            batch_size=batch_size,
            augment=augment,
            class_weights=o.class_weights(class_weights),
            workers=workers,
            seed=seed,
            device=device,
        )
    )
    opened = open_model_and_data(
        model,
        arch=arch,
        options=o.arch_options(arch_option),
        num_classes=num_classes,
        data=data,
        root=data_root,
        mean=o.numbers(mean, "--mean"),
        std=o.numbers(std, "--std"),
        ood=ood or (),
        unsafe=unsafe_load,
    )
    what: dict[str, Any] = {
        "sparsity": sparsity,
        "criterion": criterion,
        "round_to": round_to,
        "uq": method,
        "calibration": calibration,
    }
    plan = cuq.plan_compression(opened.checkpoint.model, opened.splits, **what)
    _show_plan(plan, training, opened.splits)
    if dry_run:
        return
    work_dir = target.parent / f".{target.name}.training" if resume else None
    if work_dir is not None:
        work_dir.mkdir(parents=True, exist_ok=True)
    with progress() as callback:
        bundle = cuq.compress(
            opened.checkpoint.model,
            opened.splits,
            training=training,
            arch=opened.checkpoint.architecture,
            control=control,
            progress=callback,
            work_dir=work_dir,
            **what,
        )
        bundle.save(target, overwrite=overwrite)
    if work_dir is not None:
        shutil.rmtree(work_dir)
    show_card(bundle.report.to_json())
    note(f"The bundle is in {target}/: model.onnx, report.html and the rest.")
    if json:
        print_json(bundle.report.to_json())
    unmet = bundle.card.unmet(requirements) if bundle.card is not None else []
    if unmet:
        raise cuq.errors.RequirementNotMetError(
            f"--require is not met: {'; '.join(unmet)} (the bundle is kept in {target})"
        )


def show_card(report: dict[str, Any]) -> None:
    """The card as a table, and its warnings."""
    present = [c for c in ("dense", "dense_calibrated", "control", "compressed", "onnx") if report.get(c)]
    rows = [[name, *(texts[c] for c in present)] for name, texts in cuq.report.table_rows(report)]
    show_table("Report card", ["", *present], rows)
    for warning in report["warnings"]:
        console.print(f"warning: {warning}", style="yellow", markup=False)


def _method(name: str, given: dict[str, Any]) -> Any:
    """A configured method; an option that it does not have is named, or noted where it merely has no effect."""
    kind = cuq.uq.METHODS[name]
    fields = kind.__dataclass_fields__
    ignored = [f"--{option.replace('_', '-')}" for option in given if option not in fields and option != "seed"]
    if ignored:
        note(f"note: {name} has no use for {', '.join(ignored)}")
    values = {option: value for option, value in given.items() if option in fields}
    if isinstance(values.get("at"), str) and values["at"] != "auto":
        values["at"] = tuple(values["at"].split(","))
    return kind(**values)


def _show_plan(plan: cuq.pipeline.CompressionPlan, training: cuq.TrainingConfig, splits: cuq.Splits) -> None:
    before, after = plan.pruned.before, plan.pruned.after
    described = plan.uncertainty
    rows = [
        ["parameters", f"{before.parameters:,} -> {after.parameters:,}"],
        ["MACs of one pass", f"{before.macs:,} -> {after.macs:,} ({after.macs / before.macs:.2f})"],
        ["channels removed", f"{plan.pruned.sparsity:.3f} of all prunable"],
        ["uncertainty", f"{described['method']}, {described['samples']} samples"],
    ]
    sites = described.get("sites")
    if isinstance(sites, Sequence):
        rows.append(["dropout after", ", ".join(str(site) for site in sites)])
        rows.append(["cost of a prediction", f"{described['share_of_dense_pass']:.2f} of one dense pass in MACs"])
    rows.append(["fine-tuning", f"{training.epochs} epochs, learning rate {training.lr}, batch {training.batch_size}"])
    rows.append(["data", f"{splits.info.name}, mean {splits.info.mean}, std {splits.info.std}"])
    rows.append(["calibration images", plan.calibration])
    show_table("Plan", ["", ""], rows)
    for warning in plan.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False)
