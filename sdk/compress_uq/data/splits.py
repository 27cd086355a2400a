"""The parts of a data set, each used for one thing only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from compress_uq.errors import DataError

__all__ = ["DataInfo", "ImageDataset", "Splits", "labels_of", "shared_images", "take_class_balanced"]

ImageDataset = Dataset[Any]
"""A torch Dataset of (image (C, H, W) float, label int)."""

_PARTS = ("train", "calibration", "decision", "test")


@dataclass(frozen=True)
class DataInfo:
    """What is known of the data beyond the images; all of it ends up in the bundle."""

    name: str = "caller's splits"
    labels: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    augment: str = "none"
    """The augmentation that suits these images, used unless the caller names another."""
    calibration: str = "given by the caller"
    """Where the calibration split comes from, in words."""
    calibration_from_test: bool = False
    """True where the calibration split is a fifth of the test split."""
    fingerprint: str | None = None
    held_out: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Splits:
    """Disjoint data sets of (image, label); every part is optional and a stage names the one it misses.

    `train` is clean, not augmented. Images are fed as they come. `ood` is what out-of-distribution figures are
    reported on, `validation_ood` what a score may be chosen on; their labels are ignored.
    """

    train: ImageDataset | None = None
    calibration: ImageDataset | None = None
    decision: ImageDataset | None = None
    test: ImageDataset | None = None
    ood: Mapping[str, ImageDataset] = field(default_factory=dict)
    validation_ood: Mapping[str, ImageDataset] = field(default_factory=dict)
    info: DataInfo = field(default_factory=DataInfo)

    def __post_init__(self) -> None:
        for name, dataset in self._named():
            if len(dataset) == 0:  # type: ignore[arg-type]
                raise DataError(f"the split {name!r} is empty: give it images or leave it out")
        self._refuse_shared_indices()

    def require(self, name: str, why: str) -> ImageDataset:
        """The split of that name.

        Raises:
            DataError: it was not given; says what it is needed for.
        """
        dataset: ImageDataset | None = getattr(self, name)
        if dataset is None:
            given = ", ".join(n for n, _ in self._named()) or "none"
            raise DataError(f"{why} needs the split {name!r}, and the splits given are: {given}")
        return dataset

    def example(self) -> Tensor:
        """One image as a batch (1, C, H, W), from the first split there is.

        Raises:
            DataError: there is no split at all, or an item is not (image, label).
        """
        for name, dataset in self._named():
            item = dataset[0]
            if not isinstance(item, Sequence) or len(item) < 2 or not isinstance(item[0], Tensor):
                raise DataError(f"the split {name!r} yields {type(item).__name__}: expected (image tensor, label)")
            return item[0].unsqueeze(0)
        raise DataError("the splits are all missing: give at least the one that the stage needs")

    def _named(self) -> list[tuple[str, ImageDataset]]:
        parts = [(name, getattr(self, name)) for name in _PARTS]
        sets = [*self.ood.items(), *self.validation_ood.items()]
        return [(name, dataset) for name, dataset in parts + sets if dataset is not None]

    def _refuse_shared_indices(self) -> None:
        owner: dict[tuple[int, int], str] = {}
        for name in _PARTS:
            dataset = getattr(self, name)
            if dataset is None:
                continue
            base, indices = _base_indices(dataset)
            for index in indices:
                other = owner.setdefault((id(base), index), name)
                if other != name:
                    raise DataError(f"index {index} is in the splits {other!r} and {name!r}: splits must be disjoint")


def _base_indices(dataset: ImageDataset) -> tuple[object, Sequence[int]]:
    """The data set underneath and which of its images are used."""
    if not isinstance(dataset, Subset):
        return dataset, range(len(dataset))  # type: ignore[arg-type]
    base, indices = _base_indices(dataset.dataset)
    return base, [indices[i] for i in dataset.indices]


def labels_of(dataset: ImageDataset) -> Tensor:
    """The labels of a data set, (N,) int64, without decoding images where it lists them."""
    if isinstance(dataset, Subset):
        return labels_of(dataset.dataset)[torch.as_tensor(dataset.indices)]
    for name in ("targets", "labels"):
        listed = getattr(dataset, name, None)
        if listed is not None:
            return torch.as_tensor(listed).reshape(-1).long()
    return torch.tensor([int(dataset[i][1]) for i in range(len(dataset))])  # type: ignore[arg-type]


def take_class_balanced(labels: Tensor, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of about `fraction` of each class, at least one, and the rest; both sorted.

    Raises:
        DataError: a class has a single image.
    """
    generator = torch.Generator().manual_seed(seed)
    taken: list[int] = []
    for value in labels.unique().tolist():
        members = (labels == value).nonzero().flatten()
        if len(members) < 2:
            raise DataError(f"class {value} has a single image: it cannot be in two splits")
        count = min(max(1, round(len(members) * fraction)), len(members) - 1)
        order = torch.randperm(len(members), generator=generator)[:count]
        taken += members[order].tolist()
    chosen = set(taken)
    return sorted(chosen), [i for i in range(len(labels)) if i not in chosen]


def image_keys(dataset: ImageDataset, limit: int) -> list[bytes] | None:
    """A short hash per image, or None where the set holds more than `limit` values."""
    count = len(dataset)  # type: ignore[arg-type]
    if count * dataset[0][0].numel() > limit:
        return None
    return [hashlib.blake2b(dataset[i][0].numpy().tobytes(), digest_size=12).digest() for i in range(count)]


def shared_images(first: ImageDataset, second: ImageDataset, limit: int = 400_000_000) -> bool:
    """Whether an image stands in both: the same index of one data set, or the same pixels where they can be compared
    (sets of up to `limit` values)."""
    (base, indices), (other, others) = _base_indices(first), _base_indices(second)
    if base is other:
        return not set(indices).isdisjoint(others)
    if first[0][0].shape != second[0][0].shape:
        return False
    keys = image_keys(first, limit), image_keys(second, limit)
    return keys[0] is not None and keys[1] is not None and not set(keys[0]).isdisjoint(keys[1])


def identical_images(splits: Splits, limit: int = 400_000_000) -> dict[str, int]:
    """Images that stand in two splits, counted per pair such as `train/test`; pairs without any are left out."""
    keys = {
        f.name: image_keys(getattr(splits, f.name), limit)
        for f in fields(Splits)
        if f.name in _PARTS and getattr(splits, f.name) is not None
    }
    known = {name: set(hashes) for name, hashes in keys.items() if hashes is not None}
    names = list(known)
    counts = {
        f"{first}/{second}": len(known[first] & known[second])
        for i, first in enumerate(names)
        for second in names[i + 1 :]
    }
    return {pair: count for pair, count in counts.items() if count}
