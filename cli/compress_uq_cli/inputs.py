"""From the command line's words to a model and its data; what a checkpoint records fills in what is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import compress_uq as cuq

__all__ = ["ModelAndData", "open_model_and_data"]


@dataclass(frozen=True)
class ModelAndData:
    """A checkpoint and the splits that belong to it."""

    checkpoint: cuq.models.Checkpoint
    splits: cuq.Splits


def open_model_and_data(
    path: Path,
    *,
    arch: str | None,
    options: Mapping[str, Any],
    num_classes: int | None,
    data: str | None,
    root: Path,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    ood: Sequence[str],
    unsafe: bool,
    reserve: bool = True,
) -> ModelAndData:
    """Read the file, then its data, then build the model.

    Raises:
        InputError: whatever does not fit.
    """
    opened = cuq.models.open_model_file(path, unsafe=unsafe)
    record = opened.data
    name = data or (None if record is None else record.name)
    if name is None:
        raise cuq.InputError(
            f"{path} does not record its data: pass --data, such as cifar10 or a folder of class folders"
        )
    if data is None and ":" in name:
        raise cuq.InputError(
            f"{path} names the data {name!r}, which is not imported on its own: pass --data {name} if you trust it"
        )
    if options and arch is None:
        raise cuq.InputError("--arch-option needs --arch")
    recorded_shape = opened.recorded("input_shape")
    splits = cuq.load_splits(
        name,
        root=root,
        mean=mean or opened.recorded("mean"),
        std=std or opened.recorded("std"),
        input_shape=None if recorded_shape is None else tuple(recorded_shape),
        ood=ood,
        record=record,
        reserve=reserve,
    )
    labels = splits.info.labels
    classes = num_classes or (len(labels) if labels is not None and opened.architecture is None else None)
    shape = tuple(splits.example().shape[1:])
    checkpoint = opened.build(arch=arch, num_classes=classes, input_shape=shape, options=options)
    known = checkpoint.labels
    if known is not None and labels is not None and len(known) != len(labels):
        raise cuq.InputError(
            f"{path} has {len(known)} classes and {name} has {len(labels)}: they do not belong together"
        )
    return ModelAndData(checkpoint, splits)
