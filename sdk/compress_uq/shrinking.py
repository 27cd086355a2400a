"""Pruning and the fine-tuning after it, of one network or of each member of an ensemble."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from compress_uq.config import TrainingConfig
from compress_uq.data import Augmentation, Splits
from compress_uq.errors import InputError
from compress_uq.progress import ProgressCallback, silent, within
from compress_uq.pruning import PruneResult, PruningOptions, prune, pruning_share
from compress_uq.stages import AsGiven, Origin
from compress_uq.steps import FinetuneResult, finetune
from compress_uq.training import steps_of_epoch
from compress_uq.uq import Method

__all__ = [
    "Part",
    "Shrunk",
    "check_method",
    "finetune_dense",
    "parts_of",
    "prune_and_finetune",
    "prune_networks",
    "pruning_epochs",
    "seconds_of",
]


@dataclass(frozen=True)
class Shrunk:
    """A network that was pruned and fine-tuned."""

    pruned: PruneResult
    tuned: FinetuneResult
    seed: int
    perturbation: float
    """Of the scores that ranked its channels."""

    @property
    def seconds(self) -> float:
        """What its training took."""
        return seconds_of(self.pruned) + seconds_of(self.tuned)


def seconds_of(*results: PruneResult | FinetuneResult) -> float:
    """What the training of all took."""
    return sum(epoch.seconds for result in results for epoch in result.history)


@dataclass(frozen=True)
class Part:
    """What one of a run's networks is made from: a dense model, its images, its seed, a place to keep state."""

    dense: nn.Module
    splits: Splits
    training: TrainingConfig
    perturbation: float
    progress: ProgressCallback
    work_dir: Path | None

    def file(self, name: str) -> Path | None:
        """Where a training keeps its state, if any does."""
        return None if self.work_dir is None else self.work_dir / name


def pruning_epochs(share: float | None, epochs: int) -> int:
    """Of a run's epochs, those that pruning takes, at least one where it trains; the others are fine-tuning's."""
    return 0 if share is None else min(epochs, max(1, round(epochs * share)))


def check_method(
    method: Method,
    dense: nn.Module,
    origin: Origin,
    splits: Splits,
    *,
    pruning: PruningOptions,
    training: TrainingConfig,
) -> None:
    """Refuse, before any training, what the method could not be fitted to after it.

    Raises:
        InputError: whatever `fit_uncertainty` would refuse, as far as it can be told.
    """
    left = training.epochs - pruning_epochs(pruning_share(pruning), training.epochs)
    steps = 0
    if left:
        steps = left * steps_of_epoch(len(splits.require("train", "fine-tuning")), training.batch_size)[0]  # type: ignore[arg-type]
    method.check(dense, origin.of_data(splits), splits, steps)


def prune_and_finetune(
    models: Sequence[nn.Module],
    splits: Splits,
    *,
    pruning: PruningOptions,
    method: Method,
    training: TrainingConfig,
    augment: str | Augmentation = "auto",
    pruned: Sequence[PruneResult] = (),
    progress: ProgressCallback = silent,
    work_dir: Path | None = None,
) -> tuple[Shrunk, ...]:
    """Prune copies and train what is left, as many networks as the method has, each with its dense model as teacher.

    The networks take the dense models in turn, and seeds that follow each other. Pruning and fine-tuning of a network
    together spend the configuration's epochs: a criterion or schedule that trains takes its share, at least one, while
    channels go.

    Args:
        models: the dense models.
        method: knows how many models there are (`Method.of_models`).
        pruned: what `prune_networks` made of the same arguments; used where pruning does not train.
        work_dir: a folder where training keeps its state, to resume from.

    Raises:
        InputError: whatever the two stages refuse.
    """
    share = pruning_share(pruning)
    within_pruning = pruning_epochs(share, training.epochs)
    parts = parts_of(models, splits, method, training, progress, work_dir)
    if share is not None or not pruned:
        pruned = _prune(parts, pruning, augment, within_pruning)
    made = []
    for part, cut in zip(parts, pruned, strict=True):
        left = replace(part.training, epochs=training.epochs - within_pruning)
        tuned = finetune(
            cut, part.splits, teacher=part.dense, method=method, training=left, progress=part.progress,
            augment=augment, checkpoint=part.file("fine-tuning.pt"),
        )  # fmt: skip
        made.append(Shrunk(cut, tuned, part.training.seed, part.perturbation))
    return tuple(made)


def prune_networks(
    models: Sequence[nn.Module],
    splits: Splits,
    *,
    pruning: PruningOptions,
    method: Method,
    training: TrainingConfig,
    progress: ProgressCallback = silent,
) -> tuple[PruneResult, ...]:
    """The first half of `prune_and_finetune`, where pruning does not train.

    Raises:
        InputError: whatever `prune` refuses.
    """
    return _prune(parts_of(models, splits, method, training, progress, None), pruning, "auto", training.epochs)


def finetune_dense(
    models: Sequence[nn.Module],
    origin: Origin,
    splits: Splits,
    *,
    method: Method,
    training: TrainingConfig,
    augment: str | Augmentation = "auto",
    progress: ProgressCallback = silent,
    work_dir: Path | None = None,
) -> tuple[FinetuneResult, ...]:
    """The control of `prune_and_finetune`: the same training of the same networks, and nothing pruned.

    Args:
        origin: of the pruned networks, so that costs are compared with the same dense pass.
    """
    made = []
    for part in parts_of(models, splits, method, training, progress, work_dir):
        tuned = finetune(
            AsGiven(part.dense, origin), part.splits, teacher=part.dense, method=method, training=part.training,
            progress=part.progress, stage="control", augment=augment, checkpoint=part.file("control.pt"),
        )  # fmt: skip
        made.append(tuned)
    return tuple(made)


def parts_of(
    models: Sequence[nn.Module],
    splits: Splits,
    method: Method,
    training: TrainingConfig,
    progress: ProgressCallback,
    work_dir: Path | None = None,
) -> list[Part]:
    """One part for each of the method's networks; they take the models in turn, and seeds that follow each other."""
    if method.networks == 1:
        return [Part(models[0], splits, training, 0.0, progress, work_dir)]
    parts = []
    for i in range(method.networks):
        config = replace(training, seed=training.seed + i)
        train = None if splits.train is None else method.training_images(splits.train, config.seed)
        # Another configuration of the method is another training, whatever state it finds.
        own = None if work_dir is None else work_dir / f"member-{i + 1}-{zlib.crc32(repr(method).encode()):08x}"
        if own is not None:
            own.mkdir(parents=True, exist_ok=True)
        parts.append(
            Part(
                models[i % len(models)],
                replace(splits, train=train),
                config,
                method.perturbation if i >= len(models) else 0.0,
                within(progress, f"member {i + 1}/{method.networks}"),
                own,
            )
        )
    return parts


def _prune(
    parts: Sequence[Part], pruning: PruningOptions, augment: str | Augmentation, epochs: int
) -> tuple[PruneResult, ...]:
    if len({id(part.dense) for part in parts}) > 1 and pruning.get("initial") is not None:
        raise InputError("initial= is one model before its training, and several models were given: leave it out")
    made = []
    for part in parts:
        cut = prune(
            part.dense, part.splits.example(), splits=part.splits, training=replace(part.training, epochs=epochs),
            augment=augment, teacher=part.dense, perturbation=part.perturbation, seed=part.training.seed,
            progress=part.progress, work_dir=part.work_dir, **pruning,
        )  # fmt: skip
        made.append(cut)
    return tuple(made)
