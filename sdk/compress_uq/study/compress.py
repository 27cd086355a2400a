"""Runs that prune, fine-tune, calibrate and measure one model: `compress` without the bundle and its export."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, cast

import numpy as np

from compress_uq.calibration import AUTO
from compress_uq.compression import Compressed, Compression
from compress_uq.data import set_aside
from compress_uq.finishing import check_answers
from compress_uq.held_out import held_out_figures
from compress_uq.inputs import ModelAndData, initial_model, open_model_and_data, train_dense
from compress_uq.metrics import METRICS
from compress_uq.pruning import PruningOptions
from compress_uq.report import DECISIONS, Evaluation
from compress_uq.search import search_sparsity
from compress_uq.shrinking import check_method
from compress_uq.stages import Origin
from compress_uq.steps import logits_of_members
from compress_uq.study.kind import Context, Kind, Outcome
from compress_uq.study.resplits import resplit_ece
from compress_uq.study.settings import (
    HINTS,
    WITHOUT_BEARING,
    CompressSettings,
    changed,
    configuration,
    identity,
    of_dense,
    of_training,
    read_settings,
)
from compress_uq.study.shared import TRAININGS
from compress_uq.study.values import several
from compress_uq.uncertain import UncertainModel

__all__ = ["CompressKind"]

_PREFIXES = ("", "dense_", "dense_calibrated_", "control_", "held_out_")
_QUALITY = (*METRICS.names, "worst_class_accuracy")
_SETS = 4
"""OOD sets whose AUROC is a measure of its own, by their place in `ood`."""
_RESPLIT = ("ece_resplit", "ece_resplit_sd")
_DROPS = ("accuracy_drop", "held_out_accuracy_drop")
_COSTS = (
    "parameters", "parameters_share", "macs", "macs_share", "pass_macs", "pass_macs_share", "size_bytes",
    "dense_parameters", "dense_macs", "dense_size_bytes", "sparsity_reached", "training_seconds",
)  # fmt: skip
_NEVER_HELD_OUT = ("held_out_ood_auroc", "held_out_worst_class_accuracy")


class CompressKind(Kind[CompressSettings]):
    """Prune, fine-tune, fit the uncertainty, calibrate and measure; settings are named as in `compress-uq prune`."""

    shown = ("accuracy", "accuracy_drop", "ece", "ause", "accuracy_at_50", "parameters_share", "pass_macs_share")
    axis = "sparsity"
    settings = frozenset(HINTS)
    measures = frozenset(
        {f"{prefix}{name}" for prefix in _PREFIXES for name in _QUALITY} - {*_NEVER_HELD_OUT}
        | {*_DROPS, *_COSTS, *DECISIONS, *_RESPLIT, *(f"ood_{i}_auroc" for i in range(1, _SETS + 1))}
    )
    without_bearing = WITHOUT_BEARING

    def read(self, values: Mapping[str, Any]) -> CompressSettings:
        """The settings, each checked as far as it can be before a model is opened."""
        return read_settings(values)

    def identity(self, settings: CompressSettings) -> Mapping[str, Any]:
        """What differs from the defaults, so that a default that is spelled out changes nothing."""
        return identity(settings)

    def run(self, settings: CompressSettings, context: Context) -> Outcome:
        """The stages, each once; what the dense model scores is shared by all runs on it."""
        opened = context.shared.remembered(of_dense(settings), lambda: _open(settings, context))
        check_answers(settings.answers, opened.splits)
        dense = context.shared.record("dense", of_dense(settings), lambda: _dense_figures(settings, opened, context))
        run = _compression(settings, opened, context)
        check_method(
            run.method, run.models[0], run.origin, run.splits, pruning=run.pruning, training=run.training
        )  # fmt: skip
        if settings.budget:
            run.pruning["sparsity"] = _searched(settings, run)
        with context.shared.place(TRAININGS, of_training(settings, run.pruning)) as folder:
            run.work_dir = folder
            compressed = run.compressed()
        run.work_dir = context.work
        evaluation = run.measured(compressed.model, "measuring")
        held_out, source = _held_out(compressed.model, run)
        calibrated = _dense_calibrated(settings, run, compressed, context)
        measures = {
            **dense["measures"],
            **calibrated["measures"],
            **_quality(evaluation),
            **_costs(evaluation, compressed),
            **{name: figure.to_json()["value"] for name, figure in evaluation.decisions.items()},
            **{f"held_out_{name}": value for name, value in held_out.items()},
            "accuracy_drop": _difference(dense["measures"]["dense_accuracy"], evaluation.metrics["accuracy"].value),
            "held_out_accuracy_drop": _difference(dense["held_out_accuracy"], held_out.get("accuracy")),
        }
        measures |= {f"ood_{i}_auroc": f["auroc"].value for i, f in enumerate(evaluation.ood.values(), 1) if i <= _SETS}
        if settings.resplits:
            measures |= _resplit(settings, compressed.model, opened)
        if settings.control:
            measures |= _control(settings, run, compressed, context)
        return Outcome(measures, tuple(dict.fromkeys([*dense["notes"], *calibrated["notes"], *run.warnings, source])))

    def held_out(self, measure: str) -> str | None:
        """Costs need no data; what is measured on test has its counterpart on held-out images."""
        if measure in _COSTS or measure.startswith("held_out_"):
            return measure
        return f"held_out_{measure}" if f"held_out_{measure}" in self.measures else None

    def higher_is_better(self, measure: str) -> bool:
        """As the list of metrics has it; of sparsities the higher."""
        name = measure
        for prefix in _PREFIXES[1:]:
            name = name.removeprefix(prefix)
        return name in _HIGHER or name.startswith("ood_") or (name in METRICS and METRICS[name] == "higher")


_HIGHER = (
    "sparsity", "sparsity_reached", "worst_class_accuracy", "acceptance_coverage", "set_coverage", "set_singletons",
)  # fmt: skip


def _compression(settings: CompressSettings, opened: ModelAndData, context: Context) -> Compression:
    initial = initial_model(settings.initial, opened.checkpoint, settings.pruning["schedule"])
    models = opened.checkpoint.models
    return Compression(
        models, Origin(), opened.splits, cast(PruningOptions, {**settings.pruning, "initial": initial}),
        settings.method.of_models(len(models)), settings.answers, settings.training, progress=context.progress,
        work_dir=context.work,
    )  # fmt: skip


def _searched(settings: CompressSettings, run: Compression) -> float:
    """The sparsity that the budget leads to, with a remark."""
    search = search_sparsity(
        run.models, run.splits, settings.budget, pruning=run.pruning, method=run.method,
        calibration=run.answers.calibration, training=run.training, progress=run.progress,
    )  # fmt: skip
    run.warnings.append(f"sparsity {search.sparsity:g} is the largest tried within the budget")
    return search.sparsity


def _held_out(model: UncertainModel, run: Compression) -> tuple[dict[str, float | None], str]:
    """Figures on held-out images, with a word on which those are."""
    # What chooses a run and what certifies its decisions do not look at the same images.
    splits = replace(run.splits, decision=None) if run.answers.rules else run.splits
    return held_out_figures(model, splits, device=run.training.device, progress=run.progress)


def _dense_figures(settings: CompressSettings, opened: ModelAndData, context: Context) -> dict[str, Any]:
    """The dense model as it was given."""
    run = _compression(settings, opened, context)
    plain = run.dense()
    evaluation = run.measured(plain, "dense")
    held_out, _ = _held_out(plain, run)
    measures = {
        **_quality(evaluation, "dense_"),
        **{f"dense_{name}": getattr(evaluation.cost, name) for name in ("parameters", "macs", "size_bytes")},
    }
    notes = [*opened.splits.info.notes, *run.warnings]
    return {"measures": measures, "held_out_accuracy": held_out.get("accuracy"), "notes": notes}


def _dense_calibrated(
    settings: CompressSettings, run: Compression, compressed: Compressed, context: Context
) -> dict[str, Any]:
    """The dense model calibrated on the same images by the same calibrator: once for all runs that share these."""

    def make() -> dict[str, Any]:
        before = len(run.warnings)
        evaluation = run.measured(run.dense_calibrated(compressed), "dense, calibrated")
        return {"measures": _quality(evaluation, "dense_calibrated_"), "notes": run.warnings[before:]}

    chosen = {"calibrator": compressed.model.calibrator.name} if settings.answers.calibration == AUTO else {}
    return context.shared.record("dense_calibrated", {**of_dense(settings), **chosen}, make)


def _resplit(settings: CompressSettings, model: UncertainModel, opened: ModelAndData) -> dict[str, float | None]:
    """ECE where other images of calibration and test had been the calibration images; see `resplit_ece`."""
    splits, device = opened.splits, settings.training.device
    seen, truth = logits_of_members(model, splits.require("calibration", "resplits"), device=device)
    others, other_truth = logits_of_members(model, splits.require("test", "resplits"), device=device)
    logits, labels = np.concatenate([seen, others], axis=1), np.concatenate([truth, other_truth])
    share = len(truth) / len(labels)
    values = resplit_ece(logits, labels, model.calibrator.name, share=share, repeats=settings.resplits)
    return dict(zip(_RESPLIT, values, strict=True))


def _control(
    settings: CompressSettings, run: Compression, compressed: Compressed, context: Context
) -> dict[str, float | None]:
    """The dense model given the same fine-tuning and uncertainty: made once for all runs that share these."""
    key = {
        **of_dense(settings),
        "uq": configuration(run.method.as_prepared(compressed.networks[0].tuned.model)),
        "training": changed(settings.training),
    }

    def make() -> dict[str, float | None]:
        model, _ = run.control(compressed)
        return _quality(run.measured(model, "control"), "control_")

    return context.shared.record("control", key, make)


def _quality(evaluation: Evaluation, prefix: str = "") -> dict[str, float | None]:
    values = {name: figure.to_json()["value"] for name, figure in evaluation.metrics.items()}
    classes = [figure.value for figure in evaluation.per_class.values() if not math.isnan(figure.value)]
    values["worst_class_accuracy"] = min(classes, default=None)
    return {f"{prefix}{name}": value for name, value in values.items()}


def _costs(evaluation: Evaluation, compressed: Compressed) -> dict[str, float | None]:
    """Shares are of one pass of one dense model; of the members of an ensemble, what one pass costs is the mean."""
    cost, pruned = evaluation.cost, [network.pruned for network in compressed.networks]
    before, pass_macs = pruned[0].before, mean(cut.after.macs for cut in pruned)
    assert cost.parameters is not None
    assert cost.macs is not None
    return {
        "parameters": cost.parameters,
        "parameters_share": cost.parameters / before.parameters,
        "macs": cost.macs,
        "macs_share": cost.macs / before.macs,
        "pass_macs": pass_macs,
        "pass_macs_share": pass_macs / before.macs,
        "size_bytes": cost.size_bytes,
        "sparsity_reached": mean(cut.sparsity for cut in pruned),
        "training_seconds": compressed.seconds,
    }


def _difference(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first - second


def _open(settings: CompressSettings, context: Context) -> ModelAndData:
    """The model's file, trained first where there is none, and the data."""
    inputs = settings.inputs
    path, options = inputs.model, inputs.arch_option
    if path is None:
        arch, data = inputs.arch, inputs.data
        assert arch is not None
        assert data is not None

        def train(out: Path, state: Path) -> None:
            train_dense(
                out, arch=arch, data=data, options=inputs.arch_option, root=inputs.data_root, mean=inputs.mean,
                std=inputs.std, training=settings.dense, progress=context.progress, checkpoint=state,
            )  # fmt: skip

        path, options = str(context.shared.file("dense.pt", settings.model, train)), None
    opened = open_model_and_data(
        path, arch=inputs.arch, options=options, num_classes=inputs.num_classes, data=inputs.data,
        root=inputs.data_root, mean=inputs.mean, std=inputs.std,
        ood=several(inputs.ood), validation_ood=several(inputs.validation_ood), unsafe=inputs.unsafe_load,
    )  # fmt: skip
    return replace(opened, splits=set_aside(opened.splits, rules=settings.answers.rules))
