"""Optimisers and learning rates by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from compress_uq.config import TrainingConfig

__all__ = ["OPTIMIZERS", "SCHEDULES"]


def _sgd(parameters: list[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        parameters, config.lr, momentum=0.9, nesterov=True, weight_decay=config.weight_decay, foreach=True
    )


def _adam(parameters: list[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay, foreach=True)


def _adam_l2(parameters: list[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, config.lr, weight_decay=config.weight_decay, foreach=True)


def _one_cycle(optimizer: torch.optim.Optimizer, config: TrainingConfig, steps: int) -> Any:
    # A cycle over no more than two steps has no rising part.
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, total_steps=max(steps, 4) + 1, pct_start=0.25, cycle_momentum=False
    )


def _cosine(optimizer: torch.optim.Optimizer, _config: TrainingConfig, steps: int) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def _hold(optimizer: torch.optim.Optimizer, _config: TrainingConfig, steps: int) -> Any:
    """Down to half by a cosine over the first half, then held, so that weights go on moving to the end."""
    half = max(1, steps // 2)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.75 + 0.25 * math.cos(math.pi * min(step / half, 1.0))
    )


def _constant(optimizer: torch.optim.Optimizer, _config: TrainingConfig, _steps: int) -> Any:
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def _step(optimizer: torch.optim.Optimizer, _config: TrainingConfig, steps: int) -> Any:
    """Tenfold down after each third."""
    return torch.optim.lr_scheduler.StepLR(optimizer, max(1, math.ceil(steps / 3)), gamma=0.1)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], TrainingConfig], torch.optim.Optimizer]] = {
    "sgd": _sgd,
    "adam": _adam,
    "adam-l2": _adam_l2,
}
SCHEDULES: dict[str, Callable[[torch.optim.Optimizer, TrainingConfig, int], Any]] = {
    "auto": _one_cycle,
    "one-cycle": _one_cycle,
    "cosine": _cosine,
    "constant": _constant,
    "hold": _hold,
    "step": _step,
}
