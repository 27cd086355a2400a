"""Augmentation of a whole batch at once, on the device where it is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from compress_uq.registry import Entry, Registry

__all__ = ["AUGMENTATIONS", "Augmentation"]

Augmentation = Callable[[Tensor, torch.Generator], Tensor]
"""Maps normalised images (N, C, H, W) to images of the same shape; randomness comes from the generator."""


def none(images: Tensor, _generator: torch.Generator) -> Tensor:
    """The images as they are."""
    return images


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored left to right with probability one half."""
    chosen = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(chosen.view(-1, 1, 1, 1).to(images.device), images.flip(3), images)


def crop(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to an eighth of its size, the border repeated."""
    count, _, height, width = images.shape
    pad_y, pad_x = max(1, height // 8), max(1, width // 8)
    padded = F.pad(images, (pad_x, pad_x, pad_y, pad_y), mode="replicate")
    top = torch.randint(0, 2 * pad_y + 1, (count, 1), generator=generator)
    left = torch.randint(0, 2 * pad_x + 1, (count, 1), generator=generator)
    rows = (top + torch.arange(height)).to(images.device)
    columns = (left + torch.arange(width)).to(images.device)
    batch = torch.arange(count, device=images.device)
    # Indexing with the channel in between puts it last: (N, H, W, C).
    return padded[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def crop_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shifted, then mirrored."""
    return flip(crop(images, generator), generator)


AUGMENTATIONS: Registry[Augmentation] = Registry(
    "augmentation",
    Entry("none", "images as they are", "", none),
    Entry("crop", "shift by up to an eighth", "He 2016, section 4.2", crop),
    Entry("flip", "mirror left to right", "", flip),
    Entry("crop-flip", "shift and mirror", "He 2016, section 4.2", crop_flip),
)
