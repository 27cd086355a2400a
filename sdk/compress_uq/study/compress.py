"""Runs that prune, fine-tune, calibrate and measure one model: `compress` without the bundle and its export."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, cast, get_type_hints

from torch import nn

from compress_uq.calibration import CALIBRATORS
from compress_uq.config import TrainingConfig, configured
from compress_uq.errors import CalibrationError, InputError, ModelError, UnknownNameError
from compress_uq.held_out import held_out_figures
from compress_uq.inputs import ModelAndData, configure_method, initial_model, open_model_and_data, train_dense
from compress_uq.metrics import METRICS
from compress_uq.pruning import SCHEDULES, PruneResult, PruningOptions, configured_criterion, prune
from compress_uq.report import Evaluation, evaluate
from compress_uq.search import Budget, search_sparsity
from compress_uq.shrinking import prune_and_finetune
from compress_uq.stages import Origin
from compress_uq.steps import FinetuneResult, calibrate, finetune, fit_uncertainty, training_config
from compress_uq.storage import sha256
from compress_uq.study.kind import Context, Kind, Outcome
from compress_uq.study.values import conform, plain_hints, plain_text, to_name
from compress_uq.uncertain import UncertainModel
from compress_uq.uq import METHODS, MSP, Method

__all__ = ["CompressKind", "CompressSettings", "Inputs"]


@dataclass(frozen=True)
class Inputs:
    """Where a run's model and data come from; the names are those of `compress-uq prune`."""

    model: str | None = None
    """A model file; without one, `arch` is trained on `data`."""
    arch: str | None = None
    arch_option: Mapping[str, Any] | None = None
    num_classes: int | None = None
    data: str | None = None
    data_root: str = "data"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    ood: str | tuple[str, ...] = ()
    unsafe_load: bool = False


@dataclass(frozen=True)
class CompressSettings:
    """All that one run is made from."""

    inputs: Inputs
    model: Mapping[str, Any]
    """What tells one dense model from another: its file's hash, or how it is trained."""
    dense: TrainingConfig
    """How the dense model is trained where no file is given."""
    pruning: Mapping[str, Any]
    """What `prune` is told; criterion and schedule are configured."""
    initial: str | None
    """File of the model before its training, for a schedule that rewinds."""
    budget: tuple[Budget, ...]
    """What pruning may cost in quality, where that decides the size."""
    method: Method
    calibration: str
    training: TrainingConfig
    control: bool


def _method_options() -> dict[str, Any]:
    """Type hints of the options of all methods, under the command line's names."""
    names = {"p": "dropout", "at": "dropout_at"}
    return {
        names.get(field.name, field.name): get_type_hints(entry.value)[field.name]
        for entry in METHODS
        for field in fields(entry.value)
    }


# Where a name is a training's and pruning's, it is pruning's, as on the command line.
_PRUNING = plain_hints(get_type_hints(PruningOptions))
_METHOD = _method_options()
_INPUTS = get_type_hints(Inputs)
_TRAINING = {name: hint for name, hint in get_type_hints(TrainingConfig).items() if name not in _PRUNING}
_TABLE = Mapping[str, Any]
_OWN = {
    "uq": str, "calibration": str, "control": bool, "dense": _TABLE, "initial": str,
    "criterion_option": _TABLE, "schedule_option": _TABLE, "budget": str | tuple[str, ...],
}  # fmt: skip
_HINTS = {**_INPUTS, **_METHOD, **_TRAINING, **_PRUNING, **_OWN}

_PREFIXES = ("", "dense_", "dense_calibrated_", "control_", "held_out_")
_QUALITY = (*METRICS.names, "worst_class_accuracy")
_DROPS = ("accuracy_drop", "held_out_accuracy_drop")
_COSTS = (
    "parameters", "parameters_share", "macs", "macs_share", "pass_macs", "pass_macs_share", "size_bytes",
    "dense_parameters", "dense_macs", "dense_size_bytes", "sparsity_reached", "training_seconds",
)  # fmt: skip
_NO_BEARING = ("device", "workers")


class CompressKind(Kind[CompressSettings]):
    """Prune, fine-tune, fit the uncertainty, calibrate and measure; settings are named as in `compress-uq prune`."""

    shown = ("accuracy", "accuracy_drop", "ece", "ause", "accuracy_at_50", "parameters_share", "pass_macs_share")
    axis = "sparsity"
    settings = frozenset(_HINTS)
    measures = frozenset({f"{prefix}{name}" for prefix in _PREFIXES for name in _QUALITY} | {*_DROPS, *_COSTS})
    without_bearing = frozenset({*_NO_BEARING, "data_root", "unsafe_load"})

    def read(self, values: Mapping[str, Any]) -> CompressSettings:
        """The settings, each checked as far as it can be before a model is opened."""
        given = {name: conform(name.replace("_", "-"), value, _HINTS[name]) for name, value in values.items()}
        inputs = Inputs(**_part(given, _INPUTS))
        training = TrainingConfig(**_part(given, _TRAINING))
        training_config(training, {})
        pruning = _part(given, _PRUNING)
        pruning["criterion"] = configured_criterion(
            pruning.get("criterion", "l1"), _texts(given.get("criterion_option", {}))
        )
        pruning["schedule"] = configured(
            SCHEDULES[pruning.get("schedule", "one-shot")], _texts(given.get("schedule_option", {}))
        )
        calibration = given.get("calibration", "temperature")
        CALIBRATORS[calibration]
        method, _ = configure_method(given.get("uq", "mc-dropout"), {**_part(given, _METHOD), "seed": training.seed})
        if inputs.model is not None and "dense" in given:
            raise InputError(
                f"dense says how a model is trained, and model = {inputs.model!r} is: leave out one of them"
            )
        dense = _dense_training(given.get("dense", {}), training)
        return CompressSettings(
            inputs=inputs,
            model=_dense_model(inputs, dense),
            dense=dense,
            pruning=pruning,
            initial=given.get("initial"),
            budget=_budget(given.get("budget", ())),
            method=method,
            calibration=calibration,
            training=training,
            control=given.get("control", False),
        )

    def identity(self, settings: CompressSettings) -> Mapping[str, Any]:
        """What differs from the defaults, so that a default that is spelled out changes nothing."""
        defaults = inspect.signature(prune).parameters
        plain = {k: v for k, v in settings.pruning.items() if k not in ("criterion", "schedule")}
        return {
            **_of_dense(settings),
            "pruning": {k: v for k, v in plain.items() if v != defaults[k].default},
            "criterion": _configuration(settings.pruning["criterion"]),
            "schedule": _configuration(settings.pruning["schedule"]),
            "budget": [str(budget) for budget in settings.budget],
            "initial": None if settings.initial is None else _file_hash("initial", settings.initial),
            "uq": _configuration(settings.method),
            "training": _changed(settings.training),
            "control": settings.control,
        }

    def run(self, settings: CompressSettings, context: Context) -> Outcome:
        """The stages, each once; what the dense model scores is shared by all runs on it."""
        opened = context.shared.remembered(_of_dense(settings), lambda: _open(settings, context))
        dense = context.shared.record("dense", _of_dense(settings), lambda: _dense_figures(settings, opened, context))
        run = _Run(settings, opened, context)
        pruned, tuned = run.shrunk()
        uncertain = run.calibrated(fit_uncertainty(tuned, opened.splits))
        evaluation, held_out, source = run.measured(uncertain, "measuring")
        measures = {
            **dense["measures"],
            **_quality(evaluation),
            **_costs(evaluation, pruned, tuned),
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


_HIGHER = ("sparsity", "sparsity_reached", "worst_class_accuracy")


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
                calibration=settings.calibration, training=settings.training, progress=progress,
            )  # fmt: skip
            pruning["sparsity"] = search.sparsity
            self.notes.append(f"sparsity {search.sparsity:g} is the largest tried within the budget")
        return prune_and_finetune(
            self._model, splits, pruning=pruning, method=settings.method, training=settings.training,
            progress=progress, work_dir=self.context.work,
        )  # fmt: skip

    def calibrated(self, uncertain: UncertainModel) -> UncertainModel:
        """Calibrated, or as it was where nothing fits, with a remark."""
        settings, splits = self.settings, self.opened.splits
        try:
            return calibrate(
                uncertain, splits, method=settings.calibration, device=settings.training.device,
                progress=self.context.progress,
            )  # fmt: skip
        except CalibrationError as error:
            self.notes.append(f"not calibrated: {error}")
            return uncertain

    def measured(self, uncertain: UncertainModel, stage: str) -> tuple[Evaluation, dict[str, float | None], str]:
        """Figures on test, and on held-out images with a word on which those are."""
        device, progress = self.settings.training.device, self.context.progress
        evaluation = evaluate(uncertain, self.opened.splits, device=device, progress=progress, stage=stage)
        return evaluation, *held_out_figures(uncertain, self.opened.splits, device=device, progress=progress)


@dataclass(frozen=True)
class _Bare:
    """The dense model as a stage's result."""

    model: nn.Module
    origin: Origin


def _dense_figures(settings: CompressSettings, opened: ModelAndData, context: Context) -> dict[str, Any]:
    """The dense model as it was given, and the same calibrated on the same images."""
    run = _Run(settings, opened, context)
    method, splits = MSP(), opened.splits
    plain = UncertainModel(method.fit(opened.checkpoint.model, Origin()), method, Origin().of_data(splits))
    evaluation, held_out, _ = run.measured(plain, "dense")
    calibrated = evaluate(run.calibrated(plain), splits, device=settings.training.device, stage="dense, calibrated")
    measures = {
        **_quality(evaluation, "dense_"),
        **_quality(calibrated, "dense_calibrated_"),
        **{f"dense_{name}": getattr(evaluation.cost, name) for name in ("parameters", "macs", "size_bytes")},
    }
    notes = [*splits.info.notes, *(f"dense model {note}" for note in run.notes)]
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
            run.calibrated(fit_uncertainty(beside, opened.splits)), opened.splits,
            device=settings.training.device, progress=context.progress, stage="control",
        ), "control_")  # fmt: skip

    identity = {
        **_of_dense(settings),
        "uq": _configuration(method),
        "training": _changed(settings.training),
    }
    return context.shared.record("control", identity, make)


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
    return open_model_and_data(
        path, arch=inputs.arch, options=options, num_classes=inputs.num_classes, data=inputs.data,
        root=inputs.data_root, mean=inputs.mean, std=inputs.std,
        ood=(inputs.ood,) if isinstance(inputs.ood, str) else inputs.ood, unsafe=inputs.unsafe_load,
    )  # fmt: skip


def _of_dense(settings: CompressSettings) -> dict[str, Any]:
    """What tells one dense model with its data and calibration from another."""
    kept = {k: v for k, v in _changed(settings.inputs).items() if k not in ("model", "data_root", "unsafe_load")}
    return {"model": settings.model, "inputs": kept, "calibration": settings.calibration}


def _dense_model(inputs: Inputs, dense: TrainingConfig) -> dict[str, Any]:
    """What tells a dense model from another: its file's hash, or how it is trained.

    Raises:
        InputError: neither a file nor what to train.
    """
    if inputs.model is not None:
        return {"sha256": _file_hash("model", inputs.model)}
    if inputs.arch is None or inputs.data is None:
        raise InputError("a run needs model, a file, or arch and data, from which a dense model is trained")
    return {"arch": inputs.arch, "arch_option": inputs.arch_option, "data": inputs.data, "training": _changed(dense)}


def _file_hash(setting: str, path: str) -> str:
    try:
        found = Path(path).stat()
    except OSError as error:
        raise ModelError(f"{setting} = {path!r}: no such file") from error
    return _hash_of(path, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=64)
def _hash_of(path: str, _changed_at: int, _size: int) -> str:
    return sha256(Path(path))


def _budget(given: str | tuple[str, ...]) -> tuple[Budget, ...]:
    return tuple(Budget.parse(text) for text in ((given,) if isinstance(given, str) else given))


def _dense_training(given: Mapping[str, Any], training: TrainingConfig) -> TrainingConfig:
    """How the dense model is trained; the run's own seed and device, unless others are given."""
    hints = get_type_hints(TrainingConfig)
    values: dict[str, Any] = {"seed": training.seed, "device": training.device, "workers": training.workers}
    for key, value in given.items():
        name = to_name(key)
        if name not in hints:
            raise UnknownNameError("setting of dense", key, (h.replace("_", "-") for h in hints))
        values[name] = conform(f"dense {key}", value, hints[name])
    return TrainingConfig(**values)


def _part(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in names}


def _texts(options: Mapping[str, Any]) -> dict[str, str]:
    """Options as the command line gives them."""
    return {to_name(key): plain_text(value) for key, value in options.items()}


def _configuration(chosen: Any) -> dict[str, Any]:
    """A configured plug-in in plain values."""
    return {"name": chosen.name, **_changed(chosen)}


def _changed(chosen: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from its defaults and have a bearing on what is found."""
    default = type(chosen)()
    return {
        f.name: getattr(chosen, f.name)
        for f in fields(chosen)
        if getattr(chosen, f.name) != getattr(default, f.name) and f.name not in _NO_BEARING
    }
