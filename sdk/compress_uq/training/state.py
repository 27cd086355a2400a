"""The state of a training in a file."""

from __future__ import annotations

import hashlib
import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress_uq.config import TrainingConfig
from compress_uq.storage import write_bytes
from compress_uq.training.watching import Epoch, Observer

__all__ = ["ResumableState", "signature"]


@dataclass(frozen=True)
class ResumableState:
    """The state of a training, written after each epoch and taken up again by a run of the same configuration."""

    path: Path | None
    signature: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Any
    generator: torch.Generator
    history: list[Epoch]
    observer: Observer | None

    def save(self) -> None:
        """Write what an epoch left."""
        if self.path is None:
            return
        state = {
            "signature": self.signature,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": {k: v for k, v in self.schedule.state_dict().items() if isinstance(v, int | float | list)},
            "generator": self.generator.get_state(),
            "random": torch.get_rng_state(),
            "history": [asdict(epoch) for epoch in self.history],
            "observed": None if self.observer is None else self.observer.state_dict(),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_bytes(self.path, buffer.getvalue())

    def restore(self) -> None:
        """Take up what the file holds, where there is one of the same signature."""
        if self.path is None or not self.path.is_file():
            return
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        if state["signature"] != self.signature:
            return
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["random"])
        self.history.extend(Epoch(**epoch) for epoch in state["history"])
        if self.observer is not None:
            self.observer.load_state_dict(state["observed"])


def signature(config: TrainingConfig, model: nn.Module, teacher: nn.Module | None, observer: Observer | None) -> str:
    """What has to be the same for a training to be taken up again: configuration, first weights, teacher, observer."""
    digest = hashlib.sha256(repr(config).encode())
    if observer is not None:
        digest.update(observer.configuration.encode())
    for module in (model, teacher):
        for name, value in ({} if module is None else module.state_dict()).items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
