"""The whole product, top to bottom.

model + splits -> prune -> fine-tune -> fit uncertainty -> calibrate -> choose scores -> decide
-> evaluate -> export -> report card -> bundle
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Unpack

from torch import nn

from compress_uq.bundle import Bundle, recipe_hash
from compress_uq.compression import Compression
from compress_uq.config import TrainingConfig
from compress_uq.data import Splits, set_aside
from compress_uq.errors import DataError, GateError, ModelError
from compress_uq.export import export_onnx
from compress_uq.models import Architecture
from compress_uq.planning import CompressionPlan, CompressOptions, plan_compression
from compress_uq.progress import ProgressCallback, silent
from compress_uq.recipe import recipe_of
from compress_uq.report import (
    Evaluation,
    ReportCard,
    broken,
    class_changes,
    evaluate,
    lost_classes,
    near_chance,
    onnx_milliseconds,
    suspicions,
)
from compress_uq.search import Budget
from compress_uq.stages import ModelsOrResults, Origin, unpack_all
from compress_uq.structure import differing_tensor
from compress_uq.uncertain import UncertainModel
from compress_uq.uq import Method

__all__ = ["compress"]


def compress(
    model: ModelsOrResults,
    splits: Splits,
    *,
    uq: str | Method = "mc-dropout",
    training: TrainingConfig | None = None,
    budget: Sequence[str | Budget] = (),
    arch: str | Architecture | None = None,
    control: bool = False,
    plan: CompressionPlan | None = None,
    progress: ProgressCallback = silent,
    work_dir: Path | None = None,
    **options: Unpack[CompressOptions],
) -> Bundle:
    """Prune a trained classifier, fine-tune it, and bundle it with calibrated uncertainty and a report card.

    Args:
        model: the trained classifier, or several of one architecture, each of which becomes a member of an `ensemble`;
            they are not changed. An ensemble of one model is made by pruning and fine-tuning it several times.
        splits: needs `train` (unless `epochs=0`), `calibration` (unless calibration is `none`) and `test`; a decision
            split is set aside of calibration where there is none and a rule is asked for.
        uq: uncertainty method, a name or configured, such as `MCDropout(p=0.1, samples=20)`.
        training: how to fine-tune. A criterion or schedule that trains takes its share of these epochs.
        budget: in place of a size: what the model may lose, such as `accuracy_drop<=0.01`; see `search_sparsity`.
        arch: what builds the dense model, so that a bundle can be rebuilt anywhere.
        control: also fine-tune the dense model in the same way, so that pruning's own effect shows.
        plan: what `plan_compression` made of the same arguments, so that it is not made again.
        progress: called as the work goes on.
        work_dir: a folder where training keeps its state, to resume from after an interruption.
        options: what is removed, as `prune` takes it (`sparsity` or `target`, `criterion`, `scope`, `round_to`, `keep`,
            `schedule`, `initial`), and fields of `TrainingConfig` and of `AnswerConfig` (`calibration`, `score`,
            `ood_score`, `risk`, `coverage`, `risk_delta`, `sets`) by name.

    Raises:
        InputError: whatever is wrong with the inputs, before anything is trained where it can be told.
    """
    models, _ = unpack_all(model)
    if plan is None:
        plan = plan_compression(model, splits, uq=uq, training=training, budget=budget, progress=progress, **options)
    splits = set_aside(splits, rules=plan.answers.rules)
    architecture = _architecture(arch, splits, plan.pruned.origin)
    if architecture is not None:
        _refuse_misfit(architecture, models[0])
    run = Compression(
        models, plan.pruned.origin, splits, plan.pruning, plan.method, plan.answers, plan.training, plan.augment,
        progress, work_dir, list(plan.warnings),
    )  # fmt: skip
    with _modes_kept(models):
        # The dense model as it was given.
        dense = run.dense()
        dense_evaluation = run.measured(dense, "dense")
        run.warnings += near_chance(dense_evaluation)

        # The compressed model, and the dense one calibrated as it is.
        compressed = run.compressed(plan.networks)
        dense_calibrated_evaluation = run.measured(run.dense_calibrated(compressed), "dense calibrated")
        recipe = recipe_of(plan, compressed, splits, architecture)
        evaluation = _with_cost(run.measured(compressed.model, "compressed"), training_seconds=compressed.seconds)
        uncalibrated = run.uncalibrated(compressed)

        # Its exported file, measured again, and timed beside one dense pass.
        with tempfile.TemporaryDirectory() as folder:
            files = {"onnx": Path(folder) / "model.onnx", "dense": Path(folder) / "dense.onnx"}
            as_torch = compressed.model.members.layouts[0]  # not by timing: the same run gives the same file
            export_onnx(compressed.model, files["onnx"], layout=as_torch, recipe_hash=recipe_hash(recipe))
            onnx_evaluation = evaluate(
                files["onnx"], splits, device=plan.training.device, progress=progress, stage="onnx"
            )
            run.warnings += _export_dense(dense, files)
            shape = compressed.model.origin.input_shape
            assert shape is not None
            latency = onnx_milliseconds({k: f for k, f in files.items() if f.is_file()}, shape)
            content = files["onnx"].read_bytes()

        # The dense model given the same fine-tuning and uncertainty, if it was asked for.
        control_evaluation = None
        if control:
            control_model, seconds = run.control(compressed)
            control_evaluation = _with_cost(run.measured(control_model, "control"), training_seconds=seconds)

    run.warnings += suspicions(compressed.model, splits, evaluation)
    run.warnings += lost_classes(class_changes(dense_evaluation, evaluation))
    run.warnings += broken(evaluation.decisions, compressed.model.record, len(evaluation.labels))
    run.warnings += _not_compared(compressed.model)
    card = ReportCard(
        dense=_with_cost(dense_evaluation, latency=latency.get("dense")),
        dense_calibrated=_with_cost(dense_calibrated_evaluation, latency=latency.get("dense")),
        compressed=_with_cost(evaluation, latency=latency["onnx"]),
        onnx=_with_cost(onnx_evaluation, latency=latency["onnx"]),
        control=control_evaluation,
        recipe=recipe,
        warnings=tuple(dict.fromkeys(run.warnings)),
        fidelity=_fidelity(compressed.model),
        uncalibrated=uncalibrated,
    )
    return Bundle.build(compressed.model, models[0], card, content, architecture, splits.info.fingerprint)


@contextmanager
def _modes_kept(models: Sequence[nn.Module]) -> Iterator[None]:
    """Every module's mode is the caller's again after the block."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _architecture(arch: str | Architecture | None, splits: Splits, origin: Origin) -> Architecture | None:
    if not isinstance(arch, str):
        return arch
    if splits.info.labels is None:
        raise DataError(
            f"arch={arch!r} needs the number of classes: pass an Architecture, or splits whose info has labels"
        )
    return Architecture(arch, len(splits.info.labels), origin.input_shape)


def _refuse_misfit(architecture: Architecture, dense: nn.Module) -> None:
    """A bundle that could not be rebuilt later is refused now."""
    differing = differing_tensor(architecture.build(), dense)
    if differing is not None:
        name, built, given = differing
        raise ModelError(
            f"arch {architecture.reference!r} does not build the model given: {name} is {built} in the architecture "
            f"and {given} in the model"
        )


def _export_dense(plain: UncertainModel, files: Mapping[str, Path]) -> list[str]:
    try:
        export_onnx(plain, files["dense"])
    except GateError as error:
        return [f"the dense model could not be timed in ONNX Runtime: {error}"]
    return []


def _with_cost(
    column: Evaluation, *, latency: Mapping[str, float] | None = None, training_seconds: float | None = None
) -> Evaluation:
    cost = column.cost
    if latency is not None:
        cost = replace(cost, latency_ms=dict(latency))
    if training_seconds is not None:
        cost = replace(cost, training_seconds=training_seconds)
    return replace(column, cost=cost)


def _fidelity(model: UncertainModel) -> dict[str, float] | None:
    known = model.members.fidelity
    return None if known is None else {"samples": model.members.count, **asdict(known)}


def _not_compared(model: UncertainModel) -> list[str]:
    reason = model.members.not_compared
    if reason is None:
        return []
    return [f"the fixed masks of {model.members.count} samples were not compared with those of many more: {reason}"]
