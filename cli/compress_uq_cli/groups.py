"""Options that belong together, read into one object: typer sees an option for each field."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import compress_uq as cuq
from compress_uq_cli import options as o

__all__ = ["InputOptions", "TrainingOptions", "grouped"]


@dataclass(frozen=True)
class InputOptions:
    """What a model file is, and the data that go with it."""

    arch: o.Arch = None
    arch_option: o.ArchOption = None
    num_classes: o.NumClasses = None
    data: o.Data = None
    data_root: o.DataRoot = Path("data")
    mean: o.Mean = None
    std: o.Std = None

    def open(self, model: Path, *, unsafe: bool, **sets: Any) -> Any:
        """The checkpoint and its splits, with out-of-distribution `sets` by name."""
        return cuq.open_model_and_data(
            model,
            arch=self.arch,
            options=o.arch_options(self.arch_option),
            num_classes=self.num_classes,
            data=self.data,
            root=self.data_root,
            mean=o.numbers(self.mean, "--mean"),
            std=o.numbers(self.std, "--std"),
            unsafe=unsafe,
            **sets,
        )


@dataclass(frozen=True)
class TrainingOptions:
    """How a network is trained."""

    epochs: o.Epochs = None
    lr: o.LearningRate = None
    batch_size: o.BatchSize = None
    augment: o.Augment = None
    class_weights: o.ClassWeights = None
    workers: o.Workers = None
    seed: o.Seed = None
    device: o.Device = None

    def config(self, **others: Any) -> cuq.TrainingConfig:
        """What was given, and other fields; the rest keeps its defaults."""
        given = {**vars(self), "class_weights": o.class_weights(self.class_weights), **others}
        return cuq.TrainingConfig(**o.given(**given))


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command for typer, of one that takes some of its options as dataclasses."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    shown: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        shown += _options(groups[name]) if name in groups else [parameter.replace(annotation=hints[name])]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        made = {name: group(**{f.name: given.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        command(**made, **given)

    of_typer = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in shown]
    run.__signature__ = inspect.Signature(of_typer)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return run


def _options(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]
