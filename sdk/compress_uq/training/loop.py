"""Epochs over batches, from the first or from where a training stopped."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress_uq.config import TrainingConfig
from compress_uq.data import AUGMENTATIONS, Augmentation, ImageDataset, batches, check_labels
from compress_uq.errors import ModelError
from compress_uq.models import as_logits
from compress_uq.progress import Progress, ProgressCallback, silent
from compress_uq.training.hardware import Precision, flushed_denormals, resolve_device
from compress_uq.training.loss import TrainingLoss, class_weights
from compress_uq.training.optimizers import OPTIMIZERS, SCHEDULES
from compress_uq.training.state import ResumableState, signature
from compress_uq.training.watching import AfterBackward, Epoch, Observer

__all__ = ["fit_network", "steps_of_epoch"]


def fit_network(
    model: nn.Module,
    train: ImageDataset,
    config: TrainingConfig,
    *,
    augment: str | Augmentation,
    teacher: nn.Module | None = None,
    progress: ProgressCallback = silent,
    stage: str = "training",
    checkpoint: Path | None = None,
    after_backward: AfterBackward | None = None,
    observer: Observer | None = None,
) -> tuple[Epoch, ...]:
    """Train `model` in place and leave it in eval mode; the last epoch is kept.

    With a teacher the loss of an image is `(1 - w) CE + w t^2 KL(teacher || student)` at temperature t
    (Hinton et al. 2015, section 2), w and t from the configuration. Images with class weights weigh as much in both.

    Args:
        model: returns logits (N, K); may hold random layers.
        train: (image, label), not augmented.
        config: everything a run can be repeated from.
        augment: name or function; `auto` has to be resolved before.
        teacher: the dense model; it is copied, and answers in eval mode.
        progress: called after every batch.
        stage: what progress calls this training.
        checkpoint: file to resume from and to write after every epoch.
        after_backward: a hand on the gradients of each step.
        observer: watches the weights.

    Raises:
        ModelError: no parameter is trainable, or the loss is not finite.
        DataError: labels out of range.
    """
    device = resolve_device(config.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.epochs == 0:
        model.eval()
        return ()
    if not parameters:
        raise ModelError("all parameters are frozen: set requires_grad on those to be trained, or ask for epochs=0")
    torch.manual_seed(config.seed)
    home = parameters[0].device
    model.to(device)
    precision = Precision(model, train[0][0].unsqueeze(0).to(device))
    precision.prepare(model)
    if teacher is not None:
        teacher = copy.deepcopy(teacher).to(device).eval().requires_grad_(False)
        precision.prepare(teacher)
    optimizer = OPTIMIZERS[config.optimizer](parameters, config)
    steps, drop_last = steps_of_epoch(len(train), config.batch_size)  # type: ignore[arg-type]
    loop = _Loop(
        model=model,
        config=config,
        steps=steps,
        device=device,
        precision=precision,
        augment=AUGMENTATIONS[augment] if isinstance(augment, str) else augment,
        loss=TrainingLoss(config, class_weights(config, train, device), teacher),
        optimizer=optimizer,
        schedule=SCHEDULES[config.lr_schedule](optimizer, config, steps * config.epochs),
        generator=torch.Generator().manual_seed(config.seed),
        after_backward=after_backward,
        observer=observer,
        progress=progress,
        stage=stage,
    )
    history: list[Epoch] = []
    saved = ResumableState(
        checkpoint, signature(config, model, teacher, observer), model, optimizer, loop.schedule, loop.generator,
        history, observer,
    )  # fmt: skip
    saved.restore()
    with flushed_denormals():
        while len(history) < config.epochs:
            stream = batches(
                train, config.batch_size, shuffle=loop.generator, workers=config.workers, drop_last=drop_last
            )
            history.append(loop.epoch(stream, len(history)))
            saved.save()
    model.to(memory_format=torch.contiguous_format)
    model.to(home)
    model.eval()
    return tuple(history)


def steps_of_epoch(images: int, batch_size: int) -> tuple[int, bool]:
    """Steps of an epoch, and whether the last batch is left out: batch norm cannot train on one image."""
    drop_last = images > batch_size and images % batch_size == 1
    return images // batch_size if drop_last else math.ceil(images / batch_size), drop_last


@dataclass(frozen=True)
class _Loop:
    """All that an epoch needs; `steps` are those of one epoch."""

    model: nn.Module
    config: TrainingConfig
    steps: int
    device: torch.device
    precision: Precision
    augment: Augmentation
    loss: TrainingLoss
    optimizer: torch.optim.Optimizer
    schedule: Any
    generator: torch.Generator
    after_backward: AfterBackward | None
    observer: Observer | None
    progress: ProgressCallback
    stage: str

    def epoch(self, stream: Iterable[tuple[Tensor, Tensor]], number: int) -> Epoch:
        """The epoch after `number` others."""
        self.model.train()
        start, total, right, seen = time.perf_counter(), 0.0, 0, 0
        for done, (images, labels) in enumerate(stream, number * self.steps):
            loss, correct = self._step(images, labels, done)
            total += loss * len(labels)
            right += correct
            seen += len(labels)
            note = f"epoch {number + 1}/{self.config.epochs}, loss {total / seen:.3f}, accuracy {right / seen:.3f}"
            self.progress(Progress(self.stage, done + 1, self._all_steps, note))
        return Epoch(total / seen, right / seen, time.perf_counter() - start)

    @property
    def _all_steps(self) -> int:
        return self.config.epochs * self.steps

    def _step(self, images: Tensor, labels: Tensor, done: int) -> tuple[float, int]:
        """The step after `done` others: mean loss and images that were right."""
        images = self.precision.images(self.augment(images.to(self.device), self.generator))
        labels = labels.to(self.device)
        with self.precision.autocast():
            logits = as_logits(self.model(images)).float()
            check_labels(labels, logits.shape[1])
            loss = self.loss(images, logits, labels)
        value = loss.item()
        if not math.isfinite(value):
            epoch, step = divmod(done, self.steps)
            raise ModelError(
                f"the loss is {value} in epoch {epoch + 1}, step {step + 1}: "
                f"try a learning rate below {self.config.lr}, and check weights and images"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.after_backward is not None:
            self.after_backward(done, self._all_steps)
        self.optimizer.step()
        if self.observer is not None:
            self.observer.after_step(done + 1, self._all_steps, float(self.optimizer.param_groups[0]["lr"]))
        self.schedule.step()
        return value, int((logits.argmax(1) == labels).sum())
