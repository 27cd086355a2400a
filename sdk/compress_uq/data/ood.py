"""Out-of-distribution sets: named data sets, folders, and sets made from what is at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from compress_uq.data.folders import ImageFiles, image_files
from compress_uq.data.images import ImageTensors, Normalisation, fit_images
from compress_uq.data.named import DATASETS
from compress_uq.data.splits import ImageDataset
from compress_uq.errors import DataError, UnknownNameError
from compress_uq.registry import Entry, Registry

__all__ = ["MADE_SETS", "ood_set"]

_PHOTO_CROPS = 400


class Shuffled(Dataset[tuple[Tensor, int]]):
    """The images of another set with their patches in another order, the same for an image each time it is read."""

    def __init__(self, dataset: ImageDataset, grid: tuple[int, int]) -> None:
        self.dataset, self.grid = dataset, grid

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.dataset[index][:2]
        channels, height, width = image.shape
        rows, columns = self.grid
        high, wide = height // rows, width // columns
        order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(index))
        patches = image[:, : high * rows, : wide * columns].reshape(channels, rows, high, columns, wide)
        patches = patches.permute(1, 3, 0, 2, 4).reshape(rows * columns, channels, high, wide)[order]
        whole = patches.reshape(rows, columns, channels, high, wide).permute(2, 0, 3, 1, 4)
        shuffled = image.clone()
        shuffled[:, : high * rows, : wide * columns] = whole.reshape(channels, high * rows, wide * columns)
        return shuffled, int(label)


def _patches(test: ImageDataset, shape: Sequence[int], _normalisation: Normalisation) -> ImageDataset:
    return Shuffled(test, (min(4, shape[1]), min(4, shape[2])))


def _pixels(test: ImageDataset, shape: Sequence[int], _normalisation: Normalisation) -> ImageDataset:
    return Shuffled(test, (shape[1], shape[2]))


def _photographs(_test: ImageDataset, shape: Sequence[int], normalisation: Normalisation) -> ImageDataset:
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    random = np.random.default_rng(0)
    crops = []
    for number in range(_PHOTO_CROPS):
        photo = photos[number % len(photos)]
        side = int(random.integers(max(shape[1:]), min(photo.shape[:2]) // 2 + max(shape[1:])))
        side = min(side, *photo.shape[:2])
        top, left = (int(random.integers(0, extent - side + 1)) for extent in photo.shape[:2])
        crop = torch.from_numpy(photo[top : top + side, left : left + side].copy()).permute(2, 0, 1)
        crops.append(fit_images(crop.unsqueeze(0), shape))
    pixels = torch.cat(crops)
    return ImageTensors(pixels, torch.zeros(len(pixels)), *normalisation)


MadeSet = Callable[[ImageDataset, Sequence[int], Normalisation], ImageDataset]

MADE_SETS: Registry[MadeSet] = Registry(
    "out-of-distribution set",
    Entry("synthetic", "the test images with the patches of a 4x4 grid shuffled; near", "made here", _patches),
    Entry("photographs", "crops of the two photographs bundled with scikit-learn; far", "made here", _photographs),
    Entry("shuffled-pixels", "the test images with all pixels shuffled; far", "made here", _pixels),
)


def ood_set(
    reference: str,
    *,
    test: ImageDataset,
    shape: tuple[int, ...],
    normalisation: Normalisation | None,
    root: Path,
) -> tuple[str, ImageDataset]:
    """An out-of-distribution set and its name, with the size, channels and normalisation of the test images.

    Args:
        reference: a made set, a named data set (its test part), or a folder of images.

    Raises:
        DataError: no such set, or it needs a normalisation that is not known.
    """
    if reference in MADE_SETS:
        if reference == "photographs" and normalisation is None:
            raise DataError("--ood photographs must be normalised as the data is: pass --mean and --std")
        return reference, MADE_SETS[reference](test, shape, normalisation or ((0.0,), (1.0,)))
    folder = Path(reference)
    if reference not in DATASETS and not folder.is_dir():
        raise UnknownNameError("out-of-distribution set", reference, (*MADE_SETS.names, *DATASETS.names, "a folder"))
    if normalisation is None:
        raise DataError(f"--ood {reference} must be normalised as the data is: pass --mean and --std")
    if reference in DATASETS:
        pixels, labels = DATASETS[reference].read(root, False)
        return reference, ImageTensors(fit_images(pixels, shape), labels, *normalisation)
    files = image_files(folder)
    return folder.name, _in_memory(ImageFiles(files, [0] * len(files), shape, normalisation))


def _in_memory(dataset: ImageFiles) -> ImageDataset:
    """Small sets are decoded once, since they are read once per column of the report card."""
    count = len(dataset)
    if count * dataset[0][0].numel() > 100_000_000:
        return dataset
    return TensorDataset(torch.stack([dataset[i][0] for i in range(count)]), torch.zeros(count, dtype=torch.int64))
