"""`compress-uq prune`: the main job."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import compress_uq as cuq
from compress_uq_cli import options as o
from compress_uq_cli.console import console, note, print_json, progress, show_table
from compress_uq_cli.groups import InputOptions, TrainingOptions, grouped

__all__ = ["prune", "show_card"]


@dataclass(frozen=True)
class _Removal:
    """What is removed."""

    sparsity: Annotated[
        str | None,
        typer.Option(help="Share of each layer's channels to remove, above 0 and below 1; or PATTERN=SHARE,..."),
    ] = None
    target: Annotated[
        str | None, typer.Option(help="What may be kept of the dense model: macs=, params= or latency= a share.")
    ] = None
    budget: Annotated[
        list[str] | None,
        typer.Option(help="In place of a size: a bound such as 'accuracy_drop<=0.01', on held-out images; repeatable."),
    ] = None
    criterion: Annotated[str, typer.Option(help="Which channels go; see `methods`.")] = "l1"
    criterion_option: Annotated[list[str] | None, typer.Option(help="KEY=VALUE for the criterion; repeatable.")] = None
    scope: Annotated[str, typer.Option(help="layer: the same share everywhere; global: the least of all layers.")] = (
        "layer"
    )
    keep: Annotated[
        list[str] | None, typer.Option(help="Layers that lose nothing: a name, pattern or type; repeatable.")
    ] = None
    schedule: Annotated[str, typer.Option(help="one-shot, iterative or lottery.")] = "one-shot"
    schedule_option: Annotated[list[str] | None, typer.Option(help="KEY=VALUE for the schedule; repeatable.")] = None
    initial: Annotated[
        Path | None, typer.Option(help="The model before its training, for lottery; else drawn from a recorded seed.")
    ] = None
    round_to: Annotated[int, typer.Option(help="Channels kept are a multiple of this.")] = 8

    def configured(self, checkpoint: Any) -> dict[str, Any]:
        """As `compress` takes it."""
        schedule = cuq.pruning.configured_schedule(self.schedule, o.pairs(self.schedule_option, "--schedule-option"))
        return {
            "sparsity": self.sparsity,
            "target": self.target,
            "budget": self.budget or (),
            "criterion": cuq.pruning.configured_criterion(
                self.criterion, o.pairs(self.criterion_option, "--criterion-option")
            ),
            "scope": self.scope,
            "round_to": self.round_to,
            "keep": tuple(self.keep or ()),
            "schedule": schedule,
            "initial": cuq.initial_model(self.initial, checkpoint, schedule),
        }


@dataclass(frozen=True)
class _Uncertainty:
    """The uncertainty method."""

    uq: Annotated[str, typer.Option(help="Uncertainty method; see `methods`.")] = "mc-dropout"
    uq_option: o.UqOption = None
    samples: Annotated[
        int | None, typer.Option(help="Members per prediction, at least 1; of an ensemble at least 2.")
    ] = None
    sampling_budget: Annotated[
        float | None, typer.Option(help="What all members may cost, as a share of one dense pass in MACs.")
    ] = None
    dropout: o.Dropout = None
    dropout_at: o.DropoutAt = None
    dropout_kind: Annotated[
        str | None, typer.Option(help="What is dropped: auto, channel, element, filter or connection.")
    ] = None

    def method(self, seed: int | None) -> Any:
        """The configured method."""
        given = {name: value for name, value in vars(self).items() if name not in ("uq", "uq_option")}
        return o.method(self.uq, o.given(**given, seed=seed), o.pairs(self.uq_option, "--uq-option"))


@dataclass(frozen=True)
class _Answers:
    """What a prediction says besides the probabilities."""

    calibration: Annotated[str, typer.Option(help="Calibrator, or auto; see `methods`.")] = "temperature"
    score: Annotated[str, typer.Option(help="Behind the uncertainty: a score's name; see `methods`.")] = "confidence"
    ood_score: Annotated[
        str, typer.Option(help="Behind the OOD score: a score's name, or auto: chosen on --validation-ood.")
    ] = "entropy"
    risk: Annotated[
        float | None, typer.Option(help="Accept answers so that at most this share of them is wrong, certified.")
    ] = None
    risk_delta: Annotated[float, typer.Option(help="Probability that the risk is exceeded after all.")] = 0.05
    coverage: Annotated[
        float | None, typer.Option(help="Name sets of classes that hold the truth with this probability.")
    ] = None
    sets: Annotated[str, typer.Option(help="How the sets are made: lac or raps.")] = "lac"

    def without_use(self, validation_ood: Sequence[str] | None) -> list[str]:
        """What was given that changes nothing, for want of another option."""
        usual = type(self)()
        idle = {
            "--risk-delta has no use without --risk": self.risk is None and self.risk_delta != usual.risk_delta,
            "--sets has no use without --coverage": self.coverage is None and self.sets != usual.sets,
            "--validation-ood has no use without --ood-score auto": bool(validation_ood) and self.ood_score != "auto",
        }
        return [said for said, holds in idle.items() if holds]


@grouped
def prune(
    model: Annotated[Path, typer.Argument(help="Checkpoint, state dict (with --arch) or, unsafely, a pickled model.")],
    removal: _Removal,
    uncertainty: _Uncertainty,
    answers: _Answers,
    trained: TrainingOptions,
    inputs: InputOptions,
    ood: o.Ood = None,
    validation_ood: o.ValidationOod = None,
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
    destination = out or Path(f"{model.stem}-compressed")
    requirements = [cuq.Requirement.parse(text) for text in require or ()]
    cuq.Bundle.refuse_existing(destination, overwrite=overwrite or dry_run)
    method = uncertainty.method(trained.seed)
    training = trained.config()
    opened = inputs.open(model, unsafe=unsafe_load, ood=ood or (), validation_ood=validation_ood or ())
    for said in answers.without_use(validation_ood):
        note(f"note: {said}")
    models = list(opened.checkpoint.models)
    what: dict[str, Any] = {
        **removal.configured(opened.checkpoint),
        **vars(answers),
        "uq": method,
        "training": training,
    }
    with progress() as callback:
        plan = cuq.plan_compression(models, opened.splits, progress=callback, **what)
    _show_plan(plan, opened.splits)
    if dry_run:
        return
    work_dir = destination.parent / f".{destination.name}.training" if resume else None
    if work_dir is not None:
        work_dir.mkdir(parents=True, exist_ok=True)
    with progress() as callback:
        bundle = cuq.compress(
            models,
            opened.splits,
            arch=opened.checkpoint.architecture,
            control=control,
            plan=plan,
            progress=callback,
            work_dir=work_dir,
            **what,
        )
        bundle.save(destination, overwrite=overwrite)
    if work_dir is not None:
        shutil.rmtree(work_dir)
    _show_result(bundle, destination, requirements, json=json)


def _show_result(bundle: cuq.Bundle, destination: Path, requirements: Sequence[cuq.Requirement], *, json: bool) -> None:
    report = bundle.report.to_json()
    show_card(report)
    note(f"The bundle is in {destination}/: model.onnx, report.html and the rest.")
    if json:
        print_json(report)
    unmet = bundle.card.unmet(requirements) if bundle.card is not None else []
    if unmet:
        raise cuq.errors.RequirementNotMetError(
            f"--require is not met: {'; '.join(unmet)} (the bundle is kept in {destination})"
        )


def show_card(report: dict[str, Any]) -> None:
    """The card as a table, and its warnings."""
    present = [c for c in ("dense", "dense_calibrated", "control", "compressed", "onnx") if report.get(c)]
    rows = [[name, *(texts[c] for c in present)] for name, texts in cuq.report.table_rows(report)]
    show_table("Report card", ["", *present], rows)
    for warning in report["warnings"]:
        console.print(f"warning: {warning}", style="yellow", markup=False)


def _trials(search: cuq.SearchResult) -> list[list[str]]:
    return [
        [
            f"{trial.sparsity:.4f}",
            f"{trial.parameters_share:.3f}",
            f"{trial.macs_share:.3f}",
            *(f"{value:.4f}" for value in trial.measures.values()),
            "within" if trial.holds else "outside",
        ]
        for trial in search.trials
    ]


def _beside_target(pruned: cuq.pruning.PruneResult) -> str:
    return "" if pruned.target is None else f", {pruned.target.reached:.4f} reached of target {pruned.target.target}"


def _show_plan(plan: cuq.CompressionPlan, splits: cuq.Splits) -> None:
    before, after = plan.pruned.before, plan.pruned.after
    described, training = plan.uncertainty, plan.training
    rows = [
        ["parameters", f"{before.parameters:,} -> {after.parameters:,}"],
        ["MACs of one pass", f"{before.macs:,} -> {after.macs:,} ({after.macs / before.macs:.2f})"],
        ["channels removed", f"{plan.pruned.sparsity:.3f} of all prunable{_beside_target(plan.pruned)}"],
        ["uncertainty", f"{described['method']}, {described['samples']} samples"],
    ]
    sites = described.get("sites")
    if isinstance(sites, Sequence):
        rows.append(["dropout after", ", ".join(str(site) for site in sites)])
    macs, share = described["macs"], described["share_of_dense_pass"]
    rows.append(["cost of a prediction", f"{macs:,} MACs, {share:.2f} of one dense pass"])
    rows.append(["memory", f"{described['stored_bytes']:,} bytes of parameters and buffers"])
    rows.append(["networks trained", str(described["trainings"])])
    if plan.pruning_share is not None:
        share = plan.pruning_share
        rows.append(["pruning while training", f"the first {share:.0%} of the epochs; sizes above are those to come"])
    rows.append(["fine-tuning", f"{training.epochs} epochs, learning rate {training.lr}, batch {training.batch_size}"])
    rows.append(["data", f"{splits.info.name}, mean {splits.info.mean}, std {splits.info.std}"])
    rows.append(["calibration images", plan.calibration_images])
    if plan.search is not None:
        show_table(
            "Search", ["sparsity", "parameters", "MACs", *plan.search.trials[0].measures, ""], _trials(plan.search)
        )
        rows.append(["size", f"sparsity {plan.search.sparsity}, the largest tried within the budget"])
    show_table("Plan", ["", ""], rows)
    for warning in plan.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False)
