"""Images in memory, and the one loop that turns a data set into batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from compress_uq.data.splits import ImageDataset
from compress_uq.errors import DataError

__all__ = ["ImageTensors", "Normalisation", "as_pixels", "batches", "fit_images"]

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


def check_normalisation(normalisation: Normalisation, channels: int) -> None:
    """Refuse what images of so many channels cannot be normalised with.

    Raises:
        DataError: another number of values, or a standard deviation that is not above 0.
    """
    for name, values in zip(("mean", "std"), normalisation, strict=True):
        if len(values) not in (1, channels):
            raise DataError(f"{name} has {len(values)} values: the images have {channels} channels")
    if not min(normalisation[1]) > 0:
        raise DataError(f"std {', '.join(f'{v:g}' for v in normalisation[1])}: expected numbers above 0")


class ImageTensors(Dataset[tuple[Tensor, int]]):
    """A data set in memory: uint8 pixels, normalised as they are read.

    Args:
        pixels: (N, C, H, W) uint8.
        labels: (N,) int64.
        mean, std: per channel, of pixels in 0..1; one value stands for all channels.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
        self.pixels, self.labels = pixels, labels.long()
        check_normalisation((tuple(mean), tuple(std)), pixels.shape[1])
        self.mean, self.std = tuple(mean), tuple(std)
        self._mean = torch.tensor(mean).view(-1, 1, 1)
        self._std = torch.tensor(std).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return (self.pixels[index].float() / 255 - self._mean) / self._std, int(self.labels[index])

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        """A batch at once; torch's loader asks for it where it is there."""
        images = (self.pixels[indices].float() / 255 - self._mean) / self._std
        return list(zip(images, self.labels[indices].tolist(), strict=True))

    def fingerprint(self) -> str:
        """SHA-256 over pixels and labels."""
        digest = hashlib.sha256(self.pixels.contiguous().numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()


def fit_images(pixels: Tensor, shape: Sequence[int]) -> Tensor:
    """Bring uint8 images (N, C, H, W) to another channel count and size: grey is repeated, colour weighed to grey."""
    channels, height, width = shape
    images = pixels.float()
    if images.shape[1] == 1 and channels > 1:
        images = images.expand(-1, channels, -1, -1)
    elif images.shape[1] == 3 and channels == 1:
        images = (images * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    elif images.shape[1] != channels:
        raise DataError(f"images with {images.shape[1]} channels cannot be shown to a model with {channels}")
    if images.shape[-2:] != (height, width):
        images = F.interpolate(images, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return images.round().clamp(0, 255).byte()


def as_pixels(images: Tensor, normalisation: Normalisation) -> Tensor:
    """Normalised images (N, C, H, W) as the pixels that they were, (N, H, W, C) uint8.

    Raises:
        DataError: values that no pixel gives under this normalisation.
    """
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in normalisation)
    pixels = (images * std + mean) * 255
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= -1 and high <= 256):
        raise DataError(
            f"the file takes pixels, and the images are from {low:.4g} to {high:.4g} once the normalisation is undone: "
            "give the splits' own mean and std"
        )
    return pixels.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()


def batches(
    dataset: ImageDataset,
    batch_size: int,
    *,
    shuffle: torch.Generator | None = None,
    workers: int = 0,
    drop_last: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(images (N, C, H, W) float32, labels (N,) int64), checked.

    Raises:
        DataError: items that are not (image, label), or images that hold NaN.
    """
    loader = DataLoader(
        dataset,
        batch_size,
        shuffle=shuffle is not None,
        generator=shuffle,
        num_workers=workers,
        drop_last=drop_last,
        persistent_workers=False,
    )
    for number, item in enumerate(loader):
        if not isinstance(item, list | tuple) or len(item) < 2 or not isinstance(item[0], Tensor):
            raise DataError(f"the data yields {type(item).__name__}: expected (image tensor, label) pairs")
        images = item[0].float()
        if not bool(torch.isfinite(images).all()):
            raise DataError(f"images of batch {number} hold NaN or infinite values: clean the data first")
        yield images, torch.as_tensor(item[1]).reshape(-1).long()


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuse labels that the model has no class for.

    Raises:
        DataError: a label below 0 or not below `classes`.
    """
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise DataError(f"label {wrong} is out of range: the model has {classes} classes, 0 to {classes - 1}")
