"""The one training loop: dense models, fine-tuning, controls."""

from __future__ import annotations

import copy
import hashlib
import io
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress_uq.config import TrainingConfig
from compress_uq.cost import count_macs
from compress_uq.data import AUGMENTATIONS, Augmentation, ImageDataset, batches, check_labels, labels_of
from compress_uq.errors import DataError, InputError, ModelError
from compress_uq.models import as_logits
from compress_uq.progress import Progress, ProgressCallback, silent
from compress_uq.storage import write_bytes

__all__ = ["AfterBackward", "Epoch", "Observer", "fit_network", "resolve_device"]

_BF16_WORTHWHILE_MACS = 1_000_000

AfterBackward = Callable[[int, int], None]
"""Called between the backward pass and the optimiser's step with (steps done, steps in all); may change gradients."""


class Observer(Protocol):
    """Watches a training's weights; its state is saved with the training's, so that both go on together."""

    configuration: str
    """All that its state depends on besides the training: a training goes on from the same alone."""

    def after_step(self, done: int, total: int, lr: float) -> None:
        """Called after each of the optimiser's `total` steps, `done` of them made, gradients still in place."""

    def state_dict(self) -> dict[str, Tensor]:
        """What it holds: what is saved with every epoch, and what the method makes its members of."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what was held."""


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave, on the augmented training images and in training mode."""

    loss: float
    accuracy: float
    seconds: float


def resolve_device(name: str) -> torch.device:
    """`auto` is the first GPU where there is one.

    Raises:
        InputError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device {name!r}: expected auto, cpu or cuda[:i]") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r}: expected auto, cpu or cuda[:i]")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {name!r} is not there: {torch.cuda.device_count()} CUDA devices found; use cpu or auto"
        )
    return device


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
    generator = torch.Generator().manual_seed(config.seed)
    count = len(train)  # type: ignore[arg-type]
    example = train[0][0].unsqueeze(0).to(device)
    home = parameters[0].device
    model.to(device)
    precise = _Precision(model, example)
    precise.prepare(model)
    if teacher is not None:
        teacher = copy.deepcopy(teacher).to(device).eval().requires_grad_(False)
        precise.prepare(teacher)
    transform = AUGMENTATIONS[augment] if isinstance(augment, str) else augment
    drop_last = count > config.batch_size and count % config.batch_size == 1  # batch norm cannot train on one image
    steps = count // config.batch_size if drop_last else math.ceil(count / config.batch_size)
    optimizer = _OPTIMIZERS[config.optimizer](parameters, config)
    schedule = _SCHEDULES[config.lr_schedule](optimizer, config, steps * config.epochs)
    loss_of = _Loss(config, _class_weights(config, train, device), teacher)
    history: list[Epoch] = []
    signature = _signature(config, model, teacher, observer)
    saved = _Resumable(checkpoint, signature, model, optimizer, schedule, generator, history, observer)
    saved.restore()
    with _flushed_denormals():
        while len(history) < config.epochs:
            model.train()
            start, total, right, seen = time.perf_counter(), 0.0, 0, 0
            stream = batches(train, config.batch_size, shuffle=generator, workers=config.workers, drop_last=drop_last)
            for step, (images, labels) in enumerate(stream):
                images = precise.images(transform(images.to(device), generator))
                labels = labels.to(device)
                with precise.autocast():
                    logits = as_logits(model(images)).float()
                    check_labels(labels, logits.shape[1])
                    loss = loss_of(images, logits, labels)
                if not math.isfinite(loss.item()):
                    raise ModelError(
                        f"the loss is {loss.item()} in epoch {len(history) + 1}, step {step + 1}: "
                        f"try a learning rate below {config.lr}, and check weights and images"
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                if after_backward is not None:
                    after_backward(len(history) * steps + step, config.epochs * steps)
                optimizer.step()
                if observer is not None:
                    done, rate = len(history) * steps + step + 1, float(optimizer.param_groups[0]["lr"])
                    observer.after_step(done, config.epochs * steps, rate)
                schedule.step()
                total += loss.item() * len(labels)
                right += int((logits.argmax(1) == labels).sum())
                seen += len(labels)
                note = f"epoch {len(history) + 1}/{config.epochs}, loss {total / seen:.3f}, accuracy {right / seen:.3f}"
                progress(Progress(stage, len(history) * steps + step + 1, config.epochs * steps, note))
            history.append(Epoch(total / seen, right / seen, time.perf_counter() - start))
            saved.save()
    model.to(memory_format=torch.contiguous_format)
    model.to(home)
    model.eval()
    return tuple(history)


class _Precision:
    """bf16 autocast and channels-last where they help: convolutions large enough, hardware that computes in bf16."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self._device = example.device.type
        self._images = example.ndim == 4 and any(isinstance(m, nn.Conv2d) for m in model.modules())
        native = torch.cuda.is_bf16_supported() if self._device == "cuda" else torch.cpu._is_avx512_bf16_supported()
        self._bf16 = self._images and native and count_macs(model, example) >= _BF16_WORTHWHILE_MACS

    def prepare(self, model: nn.Module) -> None:
        if self._images:
            model.to(memory_format=torch.channels_last)

    def images(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last) if self._images else images

    def autocast(self) -> torch.autocast:
        return torch.autocast(self._device, torch.bfloat16, enabled=self._bf16)


class _Loss:
    """Cross-entropy, mixed with distillation where there is a teacher."""

    def __init__(self, config: TrainingConfig, weights: Tensor | None, teacher: nn.Module | None) -> None:
        self._share = config.distillation_weight if teacher is not None else 0.0
        self._temperature = config.distillation_temperature
        self._weights, self._teacher = weights, teacher

    def __call__(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, labels, reduction="none")
        if self._teacher is not None and self._share > 0:
            with torch.no_grad():
                target = F.log_softmax(as_logits(self._teacher(images)).float() / self._temperature, 1)
            student = F.log_softmax(logits / self._temperature, 1)
            divergence = F.kl_div(student, target, reduction="none", log_target=True).sum(1)
            loss = (1 - self._share) * loss + self._share * self._temperature**2 * divergence
        if self._weights is None:
            return loss.mean()
        weights = self._weights[labels]
        return (weights * loss).sum() / weights.sum().clamp_min(1e-12)


class _Resumable:
    """The state of a training, written after each epoch and taken up again by a run of the same configuration."""

    def __init__(
        self,
        path: Path | None,
        signature: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Any,
        generator: torch.Generator,
        history: list[Epoch],
        observer: Observer | None,
    ) -> None:
        self._path, self._model, self._optimizer, self._schedule = path, model, optimizer, schedule
        self._generator, self._history, self._signature = generator, history, signature
        self._observer = observer

    def save(self) -> None:
        if self._path is None:
            return
        state = {
            "signature": self._signature,
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": {k: v for k, v in self._schedule.state_dict().items() if isinstance(v, int | float | list)},
            "generator": self._generator.get_state(),
            "random": torch.get_rng_state(),
            "history": [asdict(epoch) for epoch in self._history],
            "observed": None if self._observer is None else self._observer.state_dict(),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_bytes(self._path, buffer.getvalue())

    def restore(self) -> None:
        if self._path is None or not self._path.is_file():
            return
        state = torch.load(self._path, map_location="cpu", weights_only=True)
        if state["signature"] != self._signature:
            return
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._generator.set_state(state["generator"])
        torch.set_rng_state(state["random"])
        self._history += [Epoch(**epoch) for epoch in state["history"]]
        if self._observer is not None:
            self._observer.load_state_dict(state["observed"])


def _signature(config: TrainingConfig, model: nn.Module, teacher: nn.Module | None, observer: Observer | None) -> str:
    """What has to be the same for a training to be taken up again: configuration, first weights, teacher, observer."""
    digest = hashlib.sha256(repr(config).encode())
    if observer is not None:
        digest.update(observer.configuration.encode())
    for module in (model, teacher):
        for name, value in ({} if module is None else module.state_dict()).items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _flushed_denormals() -> Iterator[None]:
    """Tiny weights count as zero on a CPU, where they would slow arithmetic many times over."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def _class_weights(config: TrainingConfig, train: ImageDataset, device: torch.device) -> Tensor | None:
    if config.class_weights == "none":
        return None
    if config.class_weights == "balanced":
        counts = torch.bincount(labels_of(train)).float()
        return (counts.sum() / (len(counts) * counts.clamp_min(1))).to(device)
    weights = torch.tensor(config.class_weights, device=device)
    classes = int(labels_of(train).max()) + 1
    if len(weights) < classes:
        raise DataError(f"{len(weights)} class weights given: the data have {classes} classes")
    return weights


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


_OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], TrainingConfig], torch.optim.Optimizer]] = {
    "sgd": _sgd,
    "adam": _adam,
    "adam-l2": _adam_l2,
}
_SCHEDULES: dict[str, Callable[[torch.optim.Optimizer, TrainingConfig, int], Any]] = {
    "auto": _one_cycle,
    "one-cycle": _one_cycle,
    "cosine": _cosine,
    "constant": _constant,
    "hold": _hold,
    "step": _step,
}
