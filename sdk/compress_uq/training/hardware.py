"""Where a training computes, and how precisely."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compress_uq.cost import count_macs
from compress_uq.errors import InputError

__all__ = ["Precision", "flushed_denormals", "resolve_device"]

_BF16_WORTHWHILE_MACS = 1_000_000


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


class Precision:
    """bf16 autocast and channels-last where they help: convolutions large enough, hardware that computes in bf16."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self._device = example.device.type
        self._images = example.ndim == 4 and any(isinstance(m, nn.Conv2d) for m in model.modules())
        native = torch.cuda.is_bf16_supported() if self._device == "cuda" else torch.cpu._is_avx512_bf16_supported()
        self._bf16 = self._images and native and count_macs(model, example) >= _BF16_WORTHWHILE_MACS

    def prepare(self, model: nn.Module) -> None:
        """Put the weights into the layout, in place."""
        if self._images:
            model.to(memory_format=torch.channels_last)

    def images(self, images: Tensor) -> Tensor:
        """The images in the layout."""
        return images.contiguous(memory_format=torch.channels_last) if self._images else images

    def autocast(self) -> torch.autocast:
        """The context of a forward pass."""
        return torch.autocast(self._device, torch.bfloat16, enabled=self._bf16)


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Tiny weights count as zero on a CPU, where they would slow arithmetic many times over."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
