"""Runs that prune, fine-tune, calibrate and measure one model: `compress` without the bundle and its export."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from compress_uq.config import AnswerConfig
from compress_uq.data import set_aside
from compress_uq.finishing import finish, finish_model
from compress_uq.held_out import held_out_figures
from compress_uq.inputs import ModelAndData, initial_model, open_model_and_data, train_dense
from compress_uq.metrics import METRICS
from compress_uq.pruning import PruneResult, PruningOptions
from compress_uq.report import DECISIONS, Evaluation, evaluate
from compress_uq.search import search_sparsity
from compress_uq.shrinking import prune_and_finetune
from compress_uq.stages import ModelOrResult, Origin
from compress_uq.steps import FinetuneResult, finetune
from compress_uq.study.kind import Context, Kind, Outcome
from compress_uq.study.settings import (
    HINTS,
    WITHOUT_BEARING,
    CompressSettings,
    changed,
    configuration,
    identity,
    of_dense,
    read_settings,
)
from compress_uq.uncertain import UncertainModel
from compress_uq.uq import MSP, Method, Trained

__all__ = ["CompressKind"]

_PREFIXES = ("", "dense_", "dense_calibrated_", "control_", "held_out_")
_QUALITY = (*METRICS.names, "worst_class_accuracy")
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
        | {*_DROPS, *_COSTS, *DECISIONS}
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
        dense = context.shared.record("dense", of_dense(settings), lambda: _dense_figures(settings, opened, context))
        run = _Run(settings, opened, context)
        pruned, tuned = run.shrunk()
        uncertain = run.finished(tuned, "the model")
        evaluation, held_out, source = run.measured(uncertain, "measuring")
        measures = {
            **dense["measures"],
            **_quality(evaluation),
            **_costs(evaluation, pruned, tuned),
            **{name: figure.to_json()["value"] for name, figure in evaluation.decisions.items()},
            **{f"held_out_{name}": value for name, value in held_out.items()},
            "accuracy_drop": _difference(dense["measures"]["dense_accuracy"], evaluation.metrics["accuracy"].value),
            "held_out_accuracy_drop": _difference(dense["held_out_accuracy"], held_out.get("accuracy")),
        }
        if settings.control:
            measures |= _control(settings, opened, context, settings.method.as_prepared(tuned.model), pruned)
        return Outcome(measures, tuple(dict.fromkeys([*dense["notes"], *run.notes, source])))

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
        return name in _HIGHER or (name in METRICS and METRICS[name] == "higher")


_HIGHER = (
    "sparsity", "sparsity_reached", "worst_class_accuracy", "acceptance_coverage", "set_coverage", "set_singletons",
)  # fmt: skip


@dataclass
class _Run:
    """The stages of one run with what is the same in all of them, and the remarks made on the way."""

    settings: CompressSettings
    opened: ModelAndData
    context: Context
    notes: list[str] = field(default_factory=list)

    @property
    def _model(self) -> nn.Module:
        return self.opened.checkpoint.model

    def shrunk(self) -> tuple[PruneResult, FinetuneResult]:
        """Pruned and fine-tuned, to the size that a budget leads to where there is one."""
        settings, splits, progress = self.settings, self.opened.splits, self.context.progress
        initial = initial_model(settings.initial, self.opened.checkpoint, settings.pruning["schedule"])
        pruning = cast(PruningOptions, {**settings.pruning, "initial": initial})
        if settings.budget:
            search = search_sparsity(
                self._model, splits, settings.budget, pruning=pruning, method=settings.method,
                calibration=settings.answers.calibration, training=settings.training, progress=progress,
            )  # fmt: skip
            pruning["sparsity"] = search.sparsity
            self.notes.append(f"sparsity {search.sparsity:g} is the largest tried within the budget")
        return prune_and_finetune(
            self._model, splits, pruning=pruning, method=settings.method, training=settings.training,
            progress=progress, work_dir=self.context.work,
        )  # fmt: skip

    def finished(self, tuned: ModelOrResult, name: str) -> UncertainModel:
        """The uncertain model, with remarks on what could not be fitted."""
        done = finish(
            tuned, self.opened.splits, self.settings.answers, name=name, device=self.settings.training.device,
            progress=self.context.progress,
        )  # fmt: skip
        self.notes.extend(done.warnings)
        return done.model

    def measured(self, uncertain: UncertainModel, stage: str) -> tuple[Evaluation, dict[str, float | None], str]:
        """Figures on test, and on held-out images with a word on which those are."""
        device, progress = self.settings.training.device, self.context.progress
        evaluation = evaluate(uncertain, self.opened.splits, device=device, progress=progress, stage=stage)
        # What chooses a run and what certifies its decisions do not look at the same images.
        rules = self.settings.answers.rules
        splits = replace(self.opened.splits, decision=None) if rules else self.opened.splits
        return evaluation, *held_out_figures(uncertain, splits, device=device, progress=progress)


@dataclass(frozen=True)
class _Bare:
    """The dense model as a stage's result."""

    model: nn.Module
    origin: Origin


def _dense_figures(settings: CompressSettings, opened: ModelAndData, context: Context) -> dict[str, Any]:
    """The dense model as it was given, and the same calibrated on the same images."""
    run = _Run(settings, opened, context)
    method, splits = MSP(), opened.splits
    plain = UncertainModel(
        method.fit(Trained((opened.checkpoint.model,), Origin().of_data(splits))), method, Origin().of_data(splits)
    )
    evaluation, held_out, _ = run.measured(plain, "dense")
    only_calibrated = AnswerConfig(calibration=settings.answers.calibration)
    done = finish_model(plain, splits, only_calibrated, name="the dense model", device=settings.training.device)
    calibrated = evaluate(done.model, splits, device=settings.training.device, stage="dense, calibrated")
    measures = {
        **_quality(evaluation, "dense_"),
        **_quality(calibrated, "dense_calibrated_"),
        **{f"dense_{name}": getattr(evaluation.cost, name) for name in ("parameters", "macs", "size_bytes")},
    }
    notes = [*splits.info.notes, *done.warnings]
    return {"measures": measures, "held_out_accuracy": held_out.get("accuracy"), "notes": notes}


def _control(
    settings: CompressSettings, opened: ModelAndData, context: Context, method: Method, pruned: PruneResult
) -> dict[str, float | None]:
    """The dense model given the same fine-tuning and uncertainty: made once for all runs that share these."""

    def make() -> dict[str, float | None]:
        run = _Run(settings, opened, context)
        dense = opened.checkpoint.model
        beside = finetune(
            _Bare(dense, pruned.origin), opened.splits, teacher=dense, method=method, training=settings.training,
            progress=context.progress, stage="control", checkpoint=context.work / "control.pt",
        )  # fmt: skip
        return _quality(evaluate(
            run.finished(beside, "the control"), opened.splits,
            device=settings.training.device, progress=context.progress, stage="control",
        ), "control_")  # fmt: skip

    key = {
        **of_dense(settings),
        "uq": configuration(method),
        "training": changed(settings.training),
    }
    return context.shared.record("control", key, make)


def _quality(evaluation: Evaluation, prefix: str = "") -> dict[str, float | None]:
    values = {name: figure.to_json()["value"] for name, figure in evaluation.metrics.items()}
    classes = [figure.value for figure in evaluation.per_class.values() if not math.isnan(figure.value)]
    values["worst_class_accuracy"] = min(classes, default=None)
    return {f"{prefix}{name}": value for name, value in values.items()}


def _costs(evaluation: Evaluation, pruned: PruneResult, tuned: FinetuneResult) -> dict[str, float | None]:
    cost, before, after = evaluation.cost, pruned.before, pruned.after
    assert cost.parameters is not None
    assert cost.macs is not None
    return {
        "parameters": cost.parameters,
        "parameters_share": cost.parameters / before.parameters,
        "macs": cost.macs,
        "macs_share": cost.macs / before.macs,
        "pass_macs": after.macs,
        "pass_macs_share": after.macs / before.macs,
        "size_bytes": cost.size_bytes,
        "sparsity_reached": pruned.sparsity,
        "training_seconds": sum(epoch.seconds for epoch in (*pruned.history, *tuned.history)),
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
        ood=_several(inputs.ood), validation_ood=_several(inputs.validation_ood), unsafe=inputs.unsafe_load,
    )  # fmt: skip
    return replace(opened, splits=set_aside(opened.splits, rules=settings.answers.rules))


def _several(given: str | tuple[str, ...]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else given
