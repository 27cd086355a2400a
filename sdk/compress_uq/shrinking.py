"""Pruning and the fine-tuning after it, which share one budget of epochs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from compress_uq.config import TrainingConfig
from compress_uq.data import Augmentation, Splits
from compress_uq.progress import ProgressCallback, silent
from compress_uq.pruning import PruneResult, PruningOptions, prune, pruning_share
from compress_uq.steps import FinetuneResult, finetune
from compress_uq.uq import Method

__all__ = ["prune_and_finetune"]


def prune_and_finetune(
    dense: nn.Module,
    splits: Splits,
    *,
    pruning: PruningOptions,
    method: Method,
    training: TrainingConfig,
    augment: str | Augmentation = "auto",
    pruned: PruneResult | None = None,
    progress: ProgressCallback = silent,
    work_dir: Path | None = None,
) -> tuple[PruneResult, FinetuneResult]:
    """Prune a copy and train what is left, the dense model teaching; together they spend the configuration's epochs.

    A criterion or schedule that trains takes its share of the epochs, at least one, while channels go.

    Args:
        pruned: a result made before, where pruning does not train.
        work_dir: a folder where training keeps its state, to resume from.

    Raises:
        InputError: whatever the two stages refuse.
    """
    share = pruning_share(pruning)
    within = 0 if share is None else min(training.epochs, max(1, round(training.epochs * share)))
    if share is not None or pruned is None:
        pruned = prune(
            dense, splits.example(), splits=splits, training=replace(training, epochs=within), augment=augment,
            teacher=dense, seed=training.seed, progress=progress, work_dir=work_dir, **pruning,
        )  # fmt: skip
    tuned = finetune(
        pruned, splits, teacher=dense, method=method, training=replace(training, epochs=training.epochs - within),
        progress=progress, augment=augment, checkpoint=None if work_dir is None else work_dir / "fine-tuning.pt",
    )  # fmt: skip
    return pruned, tuned
