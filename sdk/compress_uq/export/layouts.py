"""How images come into a file: normalised numbers, or pixels that the graph itself resizes and normalises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress_uq.errors import InputError
from compress_uq.registry import Entry, Registry
from compress_uq.stages import Origin

__all__ = ["LAYOUTS", "FloatImages", "Layout", "Pixels", "recorded_layout"]


class Layout(nn.Module, ABC):
    """From what a file is fed to images (N, C, H, W) float32, normalised."""

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def of(cls, origin: Origin, size: Sequence[int] | None = None) -> Layout:
        """The layout for a model; `size` (H, W) of what is fed where it is not the model's own.

        Raises:
            InputError: the model does not tell what is needed, or the layout does not resize.
        """

    @abstractmethod
    def like(self, images: Tensor) -> Tensor:
        """Something to feed that stands for images (N, C, H, W): right in shape and type, not in content."""

    @abstractmethod
    def fed(self, images: Tensor) -> np.ndarray:
        """What to feed so that the model sees about these normalised images."""

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """What the file says of it; plain values."""


class FloatImages(Layout):
    """(N, C, H, W) float32, normalised by the caller."""

    name = "float32-nchw"

    @classmethod
    def of(cls, origin: Origin, size: Sequence[int] | None = None) -> Layout:
        """Needs nothing."""
        if size is not None:
            raise InputError("resize is done on pixels: pass --input uint8-nhwc (input=) with --resize (resize=)")
        return cls()

    def forward(self, images: Tensor) -> Tensor:
        """As they are."""
        return images

    def like(self, images: Tensor) -> Tensor:
        """As they are."""
        return images

    def fed(self, images: Tensor) -> np.ndarray:
        """As they are."""
        array: np.ndarray = images.numpy()
        return array

    def described(self) -> dict[str, Any]:
        """The layout alone."""
        return {"layout": "NCHW float32"}


class Pixels(Layout):
    """(N, H, W, C) uint8, resized where `size` is not the model's own, and normalised.

    Resizing is bilinear with antialias, as `torch.nn.functional.interpolate` does it. Both sizes are fixed, so that it
    is linear: two products with constant matrices, which every runtime has; TensorRT refuses an antialiased Resize.

    Args:
        shape: (C, H, W) of the model.
        mean, std: per channel, of pixels in 0..1.
        size: (H, W) of what is fed.
    """

    name = "uint8-nhwc"
    shift: Tensor
    scale: Tensor
    rows: Tensor
    columns: Tensor

    def __init__(
        self, shape: Sequence[int], mean: Sequence[float], std: Sequence[float], size: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.shape, self.size = tuple(shape), tuple(size or shape[1:])
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, shape[0]):
                raise InputError(f"{name} has {len(values)} values: the model takes {shape[0]} channels")
        deviation = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)
        self.register_buffer("scale", 1 / (255 * deviation))
        self.register_buffer("shift", -torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1) / deviation)
        self.register_buffer("rows", _resizing(self.size[0], shape[1]))
        self.register_buffer("columns", _resizing(self.size[1], shape[2]).T.contiguous())

    @classmethod
    def of(cls, origin: Origin, size: Sequence[int] | None = None) -> Layout:
        """Needs the shape of an image and its normalisation."""
        if origin.input_shape is None or len(origin.input_shape) != 3:
            raise InputError(f"input 'uint8-nhwc' needs images (C, H, W), and the model takes {origin.input_shape}")
        if origin.mean is None or origin.std is None:
            raise InputError("input 'uint8-nhwc' normalises in the graph, and the model does not record mean and std")
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise InputError(f"resize={tuple(size)}: expected height and width of the images that are fed")
        return cls(origin.input_shape, origin.mean, origin.std, size)

    def forward(self, images: Tensor) -> Tensor:
        """(N, H, W, C) uint8 to (N, C, H, W) float32."""
        pixels = images.permute(0, 3, 1, 2).float()
        if self.size != self.shape[1:]:
            pixels = torch.matmul(torch.matmul(self.rows, pixels), self.columns)
        return pixels * self.scale + self.shift

    def like(self, images: Tensor) -> Tensor:
        """Pixels drawn from a fixed seed."""
        generator = torch.Generator().manual_seed(len(images))
        shape = (len(images), *self.size, self.shape[0])
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    def fed(self, images: Tensor) -> np.ndarray:
        """The pixels, rounded, and scaled to the size that is fed."""
        pixels = (images - self.shift) / self.scale
        if self.size != self.shape[1:]:
            pixels = F.interpolate(pixels, self.size, mode="bilinear", antialias=True, align_corners=False)
        array: np.ndarray = pixels.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
        return array

    def described(self) -> dict[str, Any]:
        """The layout, and the size that is fed."""
        return {"layout": "NHWC uint8", "size": list(self.size)}


def _resizing(size: int, target: int) -> Tensor:
    """(target, size): what one axis is multiplied by."""
    identity = torch.eye(size).view(1, 1, size, size)
    return F.interpolate(identity, (target, size), mode="bilinear", antialias=True, align_corners=False)[0, 0]


LAYOUTS: Registry[type[Layout]] = Registry(
    "input layout",
    Entry(FloatImages.name, "(N, C, H, W) float32, normalised by the caller", "", FloatImages),
    Entry(Pixels.name, "(N, H, W, C) uint8 pixels, resized and normalised in the graph", "", Pixels),
)


def recorded_layout(recorded: Mapping[str, Any]) -> Layout:
    """The layout that a file's metadata under `input` describe."""
    if recorded["layout"] == FloatImages().described()["layout"]:
        return FloatImages()
    return Pixels(recorded["shape"], recorded["mean"], recorded["std"], recorded["size"])
