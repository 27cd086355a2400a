"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress_uq.errors import DataError
from compress_uq.registry import Entry, Registry

__all__ = ["DATASETS", "NamedSet", "Pixels"]

Pixels = tuple[Tensor, Tensor]
"""uint8 images (N, C, H, W) and int64 labels (N,)."""


@dataclass(frozen=True)
class NamedSet:
    """How to get a data set, and what to know about it."""

    read: Callable[[Path, bool], Pixels]
    """From a folder and whether it is the training part."""
    labels: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str
    ood: tuple[str, ...] = ()
    """Out-of-distribution sets reported on where the caller names none."""


def _digits(_root: Path, train: bool) -> Pixels:
    """scikit-learn's 1,797 digits, 8x8; every fifth of each class is the test part."""
    from sklearn.datasets import load_digits

    data = load_digits()
    labels = torch.from_numpy(data.target).long()
    pixels = torch.from_numpy((data.images * (255 / 16)).round().astype(np.uint8)).unsqueeze(1)
    place = torch.zeros_like(labels)
    for value in labels.unique():
        members = labels == value
        place[members] = torch.arange(int(members.sum()))
    part = (place % 5 != 4) if train else (place % 5 == 4)
    return pixels[part], labels[part]


def _torchvision(name: str, part: Callable[[bool], dict[str, Any]]) -> Callable[[Path, bool], Pixels]:
    """A reader of one of torchvision's classes, which downloads what is not in the folder."""

    def read(root: Path, train: bool) -> Pixels:
        import torchvision

        dataset_class = getattr(torchvision.datasets, name)
        arguments = {"root": str(root), **part(train)}
        try:
            dataset = dataset_class(download=False, **arguments)
        except RuntimeError:
            try:
                with _nothing_left(root):
                    dataset = dataset_class(download=True, **arguments)
            except Exception as error:
                raise DataError(
                    f"{name} is not under {root} and could not be downloaded ({_first_line(error)}): "
                    "pass --data-root with the folder that holds it"
                ) from error
        pixels = torch.as_tensor(np.asarray(dataset.data))
        labels = torch.as_tensor(np.asarray(dataset.labels if hasattr(dataset, "labels") else dataset.targets))
        if pixels.ndim == 3:
            pixels = pixels.unsqueeze(1)
        elif pixels.shape[-1] == 3:
            pixels = pixels.permute(0, 3, 1, 2).contiguous()
        return pixels, labels.long()

    return read


@contextmanager
def _nothing_left(root: Path) -> Iterator[None]:
    """Folders that a failed download made, and has put nothing into, are taken away again."""
    there = {root, *root.rglob("*")} if root.is_dir() else set()
    try:
        yield
    except Exception:
        for folder in sorted({root, *root.rglob("*")} - there, reverse=True):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _by_flag(train: bool) -> dict[str, Any]:
    return {"train": train}


def _by_split(train: bool) -> dict[str, Any]:
    return {"split": "train" if train else "test"}


_TEN = tuple("0123456789")
_FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR100 = tuple(
    (
        "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel "
        "can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur "
        "dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion "
        "lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree "
        "pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea "
        "seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank "
        "telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"
    ).split()
)

DATASETS: Registry[NamedSet] = Registry(
    "data set",
    Entry(
        "digits",
        "1,797 grey 8x8 digits, bundled with scikit-learn",
        "Alpaydin 1998",
        NamedSet(_digits, _TEN, (0.305,), (0.376,), "none", ("photographs", "shuffled-pixels")),
    ),
    Entry(
        "mnist",
        "70,000 grey 28x28 digits",
        "LeCun 1998",
        NamedSet(_torchvision("MNIST", _by_flag), _TEN, (0.1307,), (0.3081,), "crop"),
    ),
    Entry(
        "fashion-mnist",
        "70,000 grey 28x28 pieces of clothing",
        "Xiao 2017",
        NamedSet(_torchvision("FashionMNIST", _by_flag), _FASHION, (0.286,), (0.353,), "flip"),
    ),
    Entry(
        "cifar10",
        "60,000 colour 32x32 images, 10 classes",
        "Krizhevsky 2009",
        NamedSet(
            _torchvision("CIFAR10", _by_flag), _CIFAR10, (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616), "crop-flip"
        ),
    ),
    Entry(
        "cifar100",
        "60,000 colour 32x32 images, 100 classes",
        "Krizhevsky 2009",
        NamedSet(
            _torchvision("CIFAR100", _by_flag),
            _CIFAR100,
            (0.5071, 0.4865, 0.4409),
            (0.2673, 0.2564, 0.2762),
            "crop-flip",
        ),
    ),
    Entry(
        "svhn",
        "99,289 colour 32x32 house numbers",
        "Netzer 2011",
        NamedSet(_torchvision("SVHN", _by_split), _TEN, (0.4377, 0.4438, 0.4728), (0.198, 0.201, 0.197), "crop"),
    ),
)
