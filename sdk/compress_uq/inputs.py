"""From words and files to what the stages take: a model with its data, a configured method, a dense model's file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from compress_uq._version import __version__
from compress_uq.config import TrainingConfig, configured
from compress_uq.data import Splits, hold_out, labels_of, load_splits
from compress_uq.errors import InputError
from compress_uq.models import Architecture, Checkpoint, DataRecord, load_model, open_model_file, save_model
from compress_uq.progress import ProgressCallback, silent
from compress_uq.pruning import Schedule
from compress_uq.runtime import OnnxPredictor
from compress_uq.shrinking import parts_of
from compress_uq.steps import FinetuneResult, finetune, resolve_method
from compress_uq.uq import METHODS, Method

__all__ = [
    "FIELD_OF",
    "ModelAndData",
    "configure_method",
    "initial_model",
    "load_recorded_data",
    "open_model_and_data",
    "train_dense",
]

FIELD_OF = {"dropout": "p", "dropout_at": "at", "dropout_kind": "kind"}
"""Fields of methods by the names of their options on the command line, where these differ."""


@dataclass(frozen=True)
class ModelAndData:
    """A checkpoint and the splits that belong to it."""

    checkpoint: Checkpoint
    splits: Splits


def open_model_and_data(
    path: str | os.PathLike[str],
    *,
    arch: str | None = None,
    options: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    data: str | None = None,
    root: str | Path = "data",
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    ood: Sequence[str] = (),
    validation_ood: Sequence[str] = (),
    unsafe: bool = False,
    reserve: bool = True,
) -> ModelAndData:
    """Read a model file, then its data, then build the model; what the file records fills in what is left out.

    Raises:
        InputError: whatever does not fit.
    """
    opened = open_model_file(path, unsafe=unsafe)
    record = opened.data
    name = data or (None if record is None else record.name)
    if name is None:
        raise InputError(f"{path} does not record its data: pass --data, such as cifar10 or a folder of class folders")
    if data is None and ":" in name:
        raise InputError(
            f"{path} names the data {name!r}, which is not imported on its own: pass --data {name} if you trust it"
        )
    if options and arch is None:
        raise InputError("--arch-option needs --arch")
    recorded_shape = opened.recorded("input_shape")
    splits = load_splits(
        name,
        root=root,
        mean=mean or opened.recorded("mean"),
        std=std or opened.recorded("std"),
        input_shape=None if recorded_shape is None else tuple(recorded_shape),
        ood=ood,
        validation_ood=validation_ood,
        record=record,
        reserve=reserve,
    )
    labels = splits.info.labels
    classes = num_classes or (len(labels) if labels is not None and opened.architecture is None else None)
    shape = tuple(splits.example().shape[1:])
    checkpoint = opened.build(arch=arch, num_classes=classes, input_shape=shape, options=options)
    known = checkpoint.labels
    if known is not None and labels is not None and len(known) != len(labels):
        raise InputError(f"{path} has {len(known)} classes and {name} has {len(labels)}: they do not belong together")
    return ModelAndData(checkpoint, splits)


def load_recorded_data(
    file: OnnxPredictor,
    name: str | None = None,
    *,
    root: str | Path = "data",
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    ood: Sequence[str] = (),
) -> Splits:
    """The splits to measure an exported file on; what it records fills in what is left out.

    Of data a fifth of whose test split calibrated the file, `test` is the rest.

    Args:
        file: where name, normalisation and image shape are read.
        name, root, mean, std, ood: as in `load_splits`.

    Raises:
        InputError: whatever does not fit.
    """
    recorded = file.metadata
    known = name or recorded.get("data")
    if known is None:
        raise InputError(f"{file.path} does not record its data: pass --data")
    if name is None and ":" in known:
        raise InputError(f"{file.path} names the data {known!r}, which is not imported on its own: pass --data {known}")
    given: dict[str, Any] = {
        "root": root, "mean": mean or recorded["input"]["mean"], "std": std or recorded["input"]["std"],
        "input_shape": file.image_shape, "ood": ood,
    }  # fmt: skip
    splits = load_splits(known, reserve=False, **given)
    reserved = recorded.get("reserved_data")
    if reserved is None or reserved != splits.info.fingerprint:
        return splits
    return load_splits(known, reserve=True, **given)


def configure_method(
    name: str, options: Mapping[str, Any], texts: Mapping[str, str] | None = None
) -> tuple[Method, tuple[str, ...]]:
    """A method from the options that were given, as the command line names them, and those that it has no use for.

    Args:
        options: by the command line's names.
        texts: further fields of this method, each as text.

    Raises:
        UnknownNameError: no such method, or a text for a field that it does not have.
        InputError: a value that cannot be.
    """
    kind = METHODS[name]
    known = {field.name for field in fields(kind)}
    values = {FIELD_OF.get(option, option): value for option, value in options.items()}
    unused = tuple(option for option in options if FIELD_OF.get(option, option) not in known and option != "seed")
    values = {field: value for field, value in values.items() if field in known}
    if isinstance(values.get("at"), str) and values["at"] != "auto":
        values["at"] = tuple(values["at"].split(","))
    return replace(configured(kind, texts or {}), **values), unused


def initial_model(path: str | os.PathLike[str] | None, checkpoint: Checkpoint, schedule: Schedule) -> nn.Module | None:
    """The model before its training, for a schedule that rewinds to it: a file, or drawn from the recorded seed.

    None where neither is known, or the schedule does not need it.
    """
    if path is not None:
        return load_model(path, arch=None if checkpoint.architecture is None else checkpoint.architecture.reference)
    seed = checkpoint.training.get("seed") if len(checkpoint.models) == 1 else None
    if schedule.rewinds_to in (None, "random") or seed is None or checkpoint.architecture is None:
        return None
    return checkpoint.architecture.build(seed)


def train_dense(
    out: str | os.PathLike[str],
    *,
    arch: str,
    data: str,
    uq: str | Method = "msp",
    options: Mapping[str, Any] | None = None,
    root: str | Path = "data",
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    training: TrainingConfig | None = None,
    progress: ProgressCallback = silent,
    checkpoint: Path | None = None,
) -> tuple[tuple[FinetuneResult, ...], Splits]:
    """Train an architecture on a data set and write a checkpoint, with a tenth of the images held out and recorded.

    The checkpoint holds plain networks, as many as the method has: what the method puts into a network, such as dropout
    at every site, acts while it trains, and what it observes is not kept.

    Args:
        out: the file to write.
        arch, options: what builds the model.
        data, root, mean, std: as in `load_splits`.
        uq: the uncertainty method to train with.
        training: its seed also draws the initial weights and the tenth.
        progress: called after every batch.
        checkpoint: file to resume from and to write after every epoch.

    Raises:
        InputError: whatever does not fit.
    """
    training = training or TrainingConfig()
    splits = hold_out(load_splits(data, root=root, mean=mean, std=std, reserve=False), seed=training.seed)
    info = splits.info
    labels = info.labels or tuple(str(k) for k in range(int(labels_of(splits.require("train", "train")).max()) + 1))
    architecture = Architecture(arch, len(labels), tuple(splits.example().shape[1:]), options or {})
    method = resolve_method(uq).of_models(1).for_training()
    models = [architecture.build(training.seed + i) for i in range(method.networks)]
    results = []
    for number, part in enumerate(parts_of(models, splits, method, training, progress), 1):
        state = checkpoint
        if checkpoint is not None and len(models) > 1:
            state = checkpoint.with_stem(f"{checkpoint.stem}-{number}")
        result = finetune(
            part.dense, part.splits, method=method, training=part.training, progress=part.progress, stage="training",
            checkpoint=state,
        )  # fmt: skip
        results.append(replace(result, model=method.plain(result.model)))
    trained_with = {"epochs": training.epochs, "seed": training.seed, "lr": training.lr, "uq": method.name}
    save_model(
        [result.model for result in results],
        out,
        arch=architecture,
        labels=labels,
        mean=info.mean,
        std=info.std,
        data=DataRecord(data, info.fingerprint or "", info.held_out),
        training={**trained_with, "version": __version__},
    )
    return tuple(results), splits
