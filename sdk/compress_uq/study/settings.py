"""The settings of a run that compresses: from the plain values of a file to what the stages take."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, cast, get_type_hints

from compress_uq.choosing import check_validation
from compress_uq.config import AnswerConfig, TrainingConfig
from compress_uq.data import check_data_names
from compress_uq.errors import InputError, ModelError, UnknownNameError
from compress_uq.finishing import check_answers
from compress_uq.inputs import FIELD_OF, configure_method
from compress_uq.pruning import PruningOptions, check_pruning, configured_criterion, configured_schedule, prune
from compress_uq.search import Budget
from compress_uq.steps import training_config
from compress_uq.storage import sha256
from compress_uq.study.values import conform, plain_hints, plain_text, several, to_name
from compress_uq.uq import METHODS, Method

__all__ = [
    "HINTS",
    "METHOD_HINTS",
    "as_texts",
    "WITHOUT_BEARING",
    "CompressSettings",
    "Inputs",
    "changed",
    "configuration",
    "identity",
    "of_dense",
    "of_training",
    "read_settings",
]


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
    validation_ood: str | tuple[str, ...] = ()
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
    answers: AnswerConfig
    training: TrainingConfig
    control: bool
    resplits: int = 0
    """How often calibration images are drawn anew, and the calibrator fitted on them, for `ece_resplit`."""


def _method_options() -> dict[str, Any]:
    """Type hints of the options of all methods, under the command line's names."""
    names = {field: option for option, field in FIELD_OF.items()}
    found: dict[str, Any] = {}
    for entry in METHODS:
        hints = get_type_hints(entry.value)
        for field in fields(entry.value):
            name, hint = names.get(field.name, field.name), hints[field.name]
            found[name] = found[name] | hint if name in found else hint
    return found


# Where a name is a training's and pruning's, it is pruning's, as on the command line.
_PRUNING = plain_hints(get_type_hints(PruningOptions))
METHOD_HINTS = _method_options()
_INPUTS = get_type_hints(Inputs)
_TRAINING = {name: hint for name, hint in get_type_hints(TrainingConfig).items() if name not in _PRUNING}
_TABLE = Mapping[str, Any]
_ANSWERS = get_type_hints(AnswerConfig)
_OWN = {
    "uq": str, "control": bool, "resplits": int, "dense": _TABLE, "initial": str,
    "criterion_option": _TABLE, "schedule_option": _TABLE, "uq_option": _TABLE, "budget": str | tuple[str, ...],
}  # fmt: skip
HINTS = {**_INPUTS, **METHOD_HINTS, **_TRAINING, **_PRUNING, **_ANSWERS, **_OWN}


_NO_BEARING = ("device", "workers")
WITHOUT_BEARING = frozenset({*_NO_BEARING, "data_root", "unsafe_load"})


def read_settings(values: Mapping[str, Any]) -> CompressSettings:
    """The settings, each checked as far as it can be before a model is opened."""
    given = {name: conform(name.replace("_", "-"), value, HINTS[name]) for name, value in values.items()}
    inputs = Inputs(**_part(given, _INPUTS))
    training = TrainingConfig(**_part(given, _TRAINING))
    training_config(training, {})
    pruning = _part(given, _PRUNING)
    pruning["criterion"] = configured_criterion(
        pruning.get("criterion", "l1"), as_texts(given.get("criterion_option", {}))
    )
    pruning["schedule"] = configured_schedule(
        pruning.get("schedule", "one-shot"), as_texts(given.get("schedule_option", {}))
    )
    if not given.get("budget"):
        check_pruning(cast(PruningOptions, pruning))
    answers = AnswerConfig(**_part(given, _ANSWERS))
    check_answers(answers, None)
    check_validation(answers.ood_score, inputs.validation_ood)
    if inputs.data is not None:
        check_data_names(inputs.data, (*several(inputs.ood), *several(inputs.validation_ood)))
    method, _ = configure_method(
        given.get("uq", "mc-dropout"),
        {**_part(given, METHOD_HINTS), "seed": training.seed},
        as_texts(given.get("uq_option", {})),
    )
    if inputs.model is not None and "dense" in given:
        raise InputError(f"dense says how a model is trained, and model = {inputs.model!r} is: leave out one of them")
    dense = _dense_training(given.get("dense", {}), training)
    return CompressSettings(
        inputs=inputs,
        model=_dense_model(inputs, dense),
        dense=dense,
        pruning=pruning,
        initial=given.get("initial"),
        budget=_budget(given.get("budget", ())),
        method=method,
        answers=answers,
        training=training,
        control=given.get("control", False),
        resplits=_resplits(given.get("resplits", 0)),
    )


def identity(settings: CompressSettings) -> Mapping[str, Any]:
    """What differs from the defaults, so that a default that is spelled out changes nothing."""
    return {
        **of_dense(settings),
        **of_pruning(settings, settings.pruning),
        "budget": [str(budget) for budget in settings.budget],
        "uq": configuration(settings.method),
        "training": changed(settings.training),
        "control": settings.control,
        **({"resplits": settings.resplits} if settings.resplits else {}),
        **{k: v for k, v in changed(settings.answers).items() if k != "calibration"},
    }


def of_training(settings: CompressSettings, pruning: Mapping[str, Any]) -> dict[str, Any]:
    """What tells one pruned and fine-tuned network from another, `pruning` with the size that a budget led to."""
    method = settings.method
    return {
        **of_pruning(settings, pruning),
        "data": of_dense(settings),
        "uq": configuration(method) if method.trained_apart or method.networks > 1 else None,
        "training": changed(settings.training),
    }


def of_pruning(settings: CompressSettings, pruning: Mapping[str, Any]) -> dict[str, Any]:
    """What is removed, in plain values that differ from the defaults."""
    defaults = inspect.signature(prune).parameters
    plain = {k: v for k, v in pruning.items() if k not in ("criterion", "schedule", "initial")}
    return {
        "pruning": {k: v for k, v in plain.items() if v != defaults[k].default},
        "criterion": configuration(settings.pruning["criterion"]),
        "schedule": configuration(settings.pruning["schedule"]),
        "initial": None if settings.initial is None else _file_hash("initial", settings.initial),
    }


def of_dense(settings: CompressSettings) -> dict[str, Any]:
    """What tells one dense model with its data and calibration from another."""
    kept = {k: v for k, v in changed(settings.inputs).items() if k not in ("model", "data_root", "unsafe_load")}
    rules = {"rules": settings.answers.rules} if settings.answers.rules else {}
    return {"model": settings.model, "inputs": kept, "calibration": settings.answers.calibration, **rules}


def _dense_model(inputs: Inputs, dense: TrainingConfig) -> dict[str, Any]:
    """What tells a dense model from another: its file's hash, or how it is trained.

    Raises:
        InputError: neither a file nor what to train.
    """
    if inputs.model is not None:
        return {"sha256": _file_hash("model", inputs.model)}
    if inputs.arch is None or inputs.data is None:
        raise InputError("a run needs model, a file, or arch and data, from which a dense model is trained")
    return {"arch": inputs.arch, "arch_option": inputs.arch_option, "data": inputs.data, "training": changed(dense)}


def _file_hash(setting: str, path: str) -> str:
    try:
        found = Path(path).stat()
    except OSError as error:
        raise ModelError(f"{setting} = {path!r}: no such file") from error
    return _hash_of(path, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=64)
def _hash_of(path: str, _modified: int, _size: int) -> str:
    return sha256(Path(path))


def _resplits(count: int) -> int:
    if count != 0 and count < 2:
        raise InputError(f"resplits = {count}: expected 0, or at least 2 to say how much they differ")
    return count


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


def as_texts(options: Mapping[str, Any]) -> dict[str, str]:
    """Options as the command line gives them."""
    return {to_name(key): plain_text(value) for key, value in options.items()}


def configuration(chosen: Any) -> dict[str, Any]:
    """A configured plug-in in plain values."""
    return {"name": chosen.name, **changed(chosen)}


def changed(chosen: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from its defaults and have a bearing on what is found."""
    default = type(chosen)()
    return {
        f.name: getattr(chosen, f.name)
        for f in fields(chosen)
        if getattr(chosen, f.name) != getattr(default, f.name) and f.name not in _NO_BEARING
    }
