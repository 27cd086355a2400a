"""The stages between pruning and the report card, each a function from its input to a result."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from compress_uq.calibration import CALIBRATORS, Calibrator, Identity, check_name, fit_calibrator
from compress_uq.config import TrainingConfig
from compress_uq.cost import on_device
from compress_uq.data import AUGMENTATIONS, Augmentation, ImageDataset, Splits, check_labels, divide
from compress_uq.errors import CalibrationError, InputError, UncertaintyError, UnknownNameError
from compress_uq.predict import collect
from compress_uq.progress import ProgressCallback, silent
from compress_uq.stages import ModelOrResult, ModelsOrResults, Origin, unpack, unpack_all
from compress_uq.training import Epoch, fit_network, resolve_device
from compress_uq.uncertain import UncertainModel
from compress_uq.uq import METHODS, Method, Trained

__all__ = [
    "FinetuneResult",
    "TrainingOptions",
    "calibrate",
    "cross_calibrators",
    "finetune",
    "fit_uncertainty",
    "logits_of_members",
    "members_of_images",
    "prepare_uncertainty",
    "training_config",
]


class TrainingOptions(TypedDict, total=False):
    """Fields of `TrainingConfig` that a caller may give by name."""

    epochs: int
    lr: float
    batch_size: int
    optimizer: str
    weight_decay: float
    lr_schedule: str
    augment: str | Augmentation
    class_weights: str | tuple[float, ...]
    distillation_weight: float
    distillation_temperature: float
    workers: int
    seed: int
    device: str


@dataclass(frozen=True)
class FinetuneResult:
    """A fine-tuned model, how it got there, and what the method saw on the way."""

    model: nn.Module
    history: tuple[Epoch, ...]
    observed: Any
    """Tensors that the method's observer held when training ended; None for methods that watch nothing."""
    method: Method | None
    origin: Origin


def training_config(base: TrainingConfig | None, options: TrainingOptions) -> tuple[TrainingConfig, Any]:
    """The configuration with the options laid over it, and the augmentation, which may be a function.

    Raises:
        UnknownNameError: an option that is not a field, or an unknown augmentation; names the nearest.
        InputError: a device that is not there.
    """
    known = {field.name for field in dataclasses.fields(TrainingConfig)}
    for name in options:
        if name not in known:
            raise UnknownNameError("training option", name, known)
    values: dict[str, Any] = dict(options)
    function = values.pop("augment", None)
    config = replace(base or TrainingConfig(), **values)
    resolve_device(config.device)
    if callable(function):
        return replace(config, augment=getattr(function, "__name__", "function")), function
    if function is not None:
        config = replace(config, augment=function)
    if config.augment != "auto":
        AUGMENTATIONS[config.augment]  # an unknown name is refused before any work
    return config, config.augment


def finetune(
    model: ModelOrResult,
    splits: Splits,
    *,
    teacher: nn.Module | None = None,
    method: str | Method | None = None,
    training: TrainingConfig | None = None,
    progress: ProgressCallback = silent,
    stage: str = "fine-tuning",
    checkpoint: Path | None = None,
    **options: Unpack[TrainingOptions],
) -> FinetuneResult:
    """Train a copy of a model, with its uncertainty method in place; the last epoch is kept.

    Args:
        model: a module, or a stage's result.
        splits: needs `train`.
        teacher: the dense model, to distil from; without one the loss is cross-entropy alone.
        method: a name or configured method; it prepares the model before training.
        training: configuration; any of its fields can be given by name instead.
        progress: called after every batch.
        checkpoint: file to resume from and to write after every epoch.

    Raises:
        DataError: no training split, or labels out of range.
        ModelError: every parameter is frozen, or the loss is not finite.
    """
    given, origin = unpack(model)
    origin = origin.of_data(splits)
    chosen = resolve_method(method) if method is not None else None
    network = copy.deepcopy(given) if chosen is None else chosen.prepare(given, origin)
    config, augment = training_config(training, options)
    if augment == "auto":
        augment = splits.info.augment
    if chosen is not None:
        check_epochs(chosen, config.epochs)
    if config.epochs == 0:
        return FinetuneResult(network.eval(), (), None, chosen, origin)
    if config.lr_schedule == "auto" and chosen is not None:
        config = replace(config, lr_schedule=chosen.lr_schedule)
    observer = None if chosen is None else chosen.observer(network)
    history = fit_network(
        network,
        splits.require("train", "fine-tuning"),
        config,
        augment=augment,
        teacher=teacher,
        progress=progress,
        stage=stage,
        checkpoint=checkpoint,
        observer=observer,
    )
    observed = None if observer is None else observer.state_dict()
    return FinetuneResult(network, history, observed, chosen, origin)


def prepare_uncertainty(model: ModelOrResult, method: str | Method, example_inputs: Tensor | None = None) -> nn.Module:
    """A copy of the model as the method wants it trained, for your own training loop.

    Raises:
        UncertaintyError: the method cannot act on this model.
    """
    given, origin = unpack(model, example_inputs)
    prepared = resolve_method(method).prepare(given, origin)
    prepared.origin = origin  # type: ignore[assignment]
    return prepared


def check_epochs(method: Method, epochs: int) -> None:
    """Refuse a method that watches a training where there is none.

    Raises:
        UncertaintyError: names the method.
    """
    if epochs == 0 and method.watches:
        raise UncertaintyError(f"epochs=0: {method.name} is made of what it sees in training; give it 1 epoch or more")


def fit_uncertainty(
    model: ModelsOrResults,
    splits: Splits | None = None,
    *,
    method: str | Method | None = None,
    example_inputs: Tensor | None = None,
    device: str = "cpu",
) -> UncertainModel:
    """The last step of a method: an uncertain model, not yet calibrated.

    Args:
        model: what `finetune` returned, or a module, or several of either for an ensemble; a plain module gets dropout
            inserted untrained, with a warning.
        splits: what it knows of labels and normalisation is recorded; methods that look at images need `train`.
        method: by default the one that `finetune` was given.
        example_inputs: images (N, C, H, W), where a bare module does not tell their shape.
        device: where a method that looks at images computes.

    Raises:
        UncertaintyError: no method is known, it cannot act on this model, or it needed a stage that was missed.
    """
    models, origin = unpack_all(model, example_inputs)
    if splits is not None:
        origin = origin.of_data(splits)
    first = model[0] if isinstance(model, Sequence) else model
    last = first if isinstance(first, FinetuneResult) else None
    known = None if last is None else last.method
    if method is None and known is None:
        raise UncertaintyError(f"no uncertainty method is known: pass method=, one of {', '.join(METHODS.names)}")
    chosen = known if method is None else resolve_method(method)
    assert chosen is not None
    trained = Trained(
        models,
        origin,
        None if last is None else last.observed,
        None if splits is None else splits.train,
        None if splits is None else splits.calibration,
        device,
    )
    if not all(chosen.is_prepared(module) for module in trained.models):
        warnings.warn(
            f"{chosen.name} is inserted into a model that was not trained with it: pass method= to finetune for "
            "better accuracy and uncertainty",
            stacklevel=2,
        )
    return UncertainModel(chosen.fit(trained), chosen, origin)


def calibrate(
    model: UncertainModel,
    splits: Splits,
    *,
    method: str = "temperature",
    device: str = "cpu",
    progress: ProgressCallback = silent,
) -> UncertainModel:
    """A copy of the model with a calibrator fitted on the calibration split, and without decision rules.

    Args:
        model: an uncertain model; a calibrator that it has is replaced.
        splits: needs `calibration`, unless the method is `none`.
        method: a calibrator's name, or `auto`, whose choice is the fitted calibrator's `choice`.
        device: where the members are run.
        progress: called as images are read.

    Raises:
        DataError: no calibration split.
        CalibrationError: nothing to fit.
        MissingDependencyError: netcal fits it, and is not installed.
    """
    if not isinstance(model, UncertainModel):
        raise CalibrationError(
            f"calibrate takes an UncertainModel, not a {type(model).__name__}: call fit_uncertainty first"
        )
    check_name(method)
    # Thresholds hold for the probabilities that they were fitted on, and for no others.
    record = {name: value for name, value in model.record.items() if name not in ("acceptance", "sets")}
    parts = {"acceptance": None, "sets": None, "record": record}
    if method == "none":
        return model.but(calibrator=Identity(), **parts)
    dataset = splits.require("calibration", f"calibration {method!r}")
    logits, labels = logits_of_members(model, dataset, device=device, progress=progress, stage="calibrating")
    return model.but(calibrator=fit_calibrator(method, logits, labels), **parts)


def logits_of_members(
    model: UncertainModel,
    dataset: ImageDataset,
    *,
    device: str = "cpu",
    progress: ProgressCallback = silent,
    stage: str = "members",
) -> tuple[np.ndarray, np.ndarray]:
    """Uncalibrated logits (T, N, K) float32 of every member and labels (N,) int64.

    Raises:
        DataError: a label that the model has no class for.
    """
    logits, _, labels = members_of_images(model, dataset, features=False, device=device, progress=progress, stage=stage)
    return logits, labels


def members_of_images(
    model: UncertainModel,
    dataset: ImageDataset,
    *,
    features: bool,
    device: str = "cpu",
    progress: ProgressCallback = silent,
    stage: str = "members",
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """`logits_of_members`, and in between, if asked for, what enters the classifiers (G, N, D) float32.

    Raises:
        DataError: a label that the model has no class for.
    """

    def answers(images: Tensor) -> tuple[Tensor, ...]:
        columns = model.members.with_features(images) if features else (model.member_logits(images),)
        return tuple(column.transpose(0, 1) for column in columns)

    target = resolve_device(device)
    with on_device(model, target):
        columns, labels = collect(answers, dataset, device=target, progress=progress, stage=stage)
    logits, *entering = (column.swapaxes(0, 1) for column in columns)
    check_labels(torch.from_numpy(labels), logits.shape[2])
    return logits, entering[0] if features else None, labels


def cross_calibrators(name: str, logits: np.ndarray, labels: np.ndarray) -> list[tuple[list[int], Calibrator]]:
    """Class-balanced halves of the images of logits (T, N, K), each with a calibrator fitted on the other half.

    Raises:
        CalibrationError: nothing fits a half.
    """
    halves = divide(labels, 2)
    return [(own, CALIBRATORS[name].fit(logits[:, other], labels[other])) for own, other in (halves, halves[::-1])]


def resolve_method(method: str | Method) -> Method:
    """A configured method, from its name or as given.

    Raises:
        InputError: neither a name nor a method.
    """
    if isinstance(method, str):
        return METHODS[method]()
    if not isinstance(method, Method):
        raise InputError(f"method={method!r}: expected a name ({', '.join(METHODS.names)}) or a configured method")
    return method
