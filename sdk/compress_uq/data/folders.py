"""Folders of images, with class folders for labelled sets and without for out-of-distribution sets."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS

from compress_uq.data.images import Normalisation, check_normalisation
from compress_uq.errors import DataError

__all__ = ["ImageFiles", "class_folders", "image_files", "read_images", "shape_of_images"]


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Image files, decoded, resized and normalised as they are read.

    The shorter side is scaled to the target and the middle cropped, so that nothing is distorted.
    """

    def __init__(
        self, files: list[Path], targets: list[int], shape: tuple[int, ...], normalisation: Normalisation
    ) -> None:
        check_normalisation(normalisation, shape[0])
        self.files, self.targets = files, targets
        self._mode = "L" if shape[0] == 1 else "RGB"
        self._transform = transforms.Compose(
            [
                transforms.Resize(min(shape[1:])),
                transforms.CenterCrop(shape[1:]),
                transforms.ToTensor(),
                transforms.Normalize(*normalisation),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(open_image(self.files[index]).convert(self._mode)), self.targets[index]

    def fingerprint(self) -> str:
        """SHA-256 over class, name and size of every file."""
        lines = [
            f"{target}/{file.name}/{file.stat().st_size}" for file, target in zip(self.files, self.targets, strict=True)
        ]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def open_image(file: Path) -> Any:
    """A decoded image.

    Raises:
        DataError: missing, or not an image.
    """
    try:
        image = Image.open(file)
        image.load()
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{file} is not an image that can be read: {error}") from error
    return image


def read_images(files: Sequence[Path], shape: tuple[int, ...], normalisation: Normalisation) -> Tensor:
    """Images (N, C, H, W) from files, resized and normalised as a folder's are.

    Raises:
        DataError: a file is missing or not an image.
    """
    dataset = ImageFiles(list(files), [0] * len(files), shape, normalisation)
    return torch.stack([dataset[i][0] for i in range(len(dataset))])


def image_files(folder: Path) -> list[Path]:
    """All images below a folder, sorted.

    Raises:
        DataError: there are none.
    """
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMG_EXTENSIONS)
    if not files:
        raise DataError(f"{folder} holds no images ({', '.join(IMG_EXTENSIONS)})")
    return files


def class_folders(folder: Path) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """Files, their class numbers and the class names of a folder of class folders.

    Raises:
        DataError: fewer than two class folders hold images.
    """
    names = sorted(f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    if len(names) < 2:
        raise DataError(f"{folder} has {len(names)} class folders: expected a folder per class, two or more")
    files: list[Path] = []
    targets: list[int] = []
    for number, name in enumerate(names):
        found = image_files(folder / name)
        files += found
        targets += [number] * len(found)
    return files, targets, tuple(names)


def shape_of_images(files: list[Path]) -> tuple[int, int, int]:
    """(C, H, W) of the images where a few of them agree in size, else 224 pixels square."""
    images = [open_image(f) for f in files[:: max(1, len(files) // 8)]]
    channels = 1 if all(i.mode in ("1", "L", "I;16") for i in images) else 3
    sizes = {i.size for i in images}
    width, height = sizes.pop() if len(sizes) == 1 else (224, 224)
    return channels, height, width


def default_normalisation(channels: int) -> Normalisation:
    """ImageNet's for colour, the usual one half for grey."""
    if channels == 3:
        return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return (0.5,), (0.5,)
