"""From what a command line names to `Splits`, by the calibration rule.

Calibration images were seen by neither the dense nor the compressed model, chose no epoch, and carry no reported
figure. A checkpoint that records which training images it held out gives exactly those; for any other weights the
training set is contaminated, and a class-balanced fifth of the test split is taken instead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.utils.data import Subset

from compress_uq.data.folders import ImageFiles, class_folders, default_normalisation, shape_of_images
from compress_uq.data.images import ImageTensors, Normalisation
from compress_uq.data.named import DATASETS
from compress_uq.data.ood import MADE_SETS, ood_set
from compress_uq.data.splits import DataInfo, ImageDataset, Splits, labels_of, take_class_balanced
from compress_uq.errors import DataError, UnknownNameError
from compress_uq.models import DataRecord, import_callable

__all__ = ["check_data_names", "hold_out", "load_splits"]

HELD_OUT_FRACTION = 0.1
TEST_FRACTION = 0.2


@dataclass(frozen=True)
class _Source:
    """The parts of a data set before the calibration rule."""

    name: str
    train: Any
    test: Any
    labels: tuple[str, ...]
    normalisation: Normalisation
    augment: str
    ood: tuple[str, ...] = ()
    calibration: Any = None
    notes: tuple[str, ...] = ()

    def splits(self) -> Splits:
        """The parts as they are, before calibration images are set aside."""
        info = DataInfo(
            name=self.name,
            labels=self.labels,
            mean=self.normalisation[0],
            std=self.normalisation[1],
            augment=self.augment,
            fingerprint=self.train.fingerprint(),
            notes=self.notes,
        )
        return Splits(train=self.train, calibration=self.calibration, test=self.test, info=info)


def load_splits(
    name: str,
    *,
    root: str | Path = "data",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_shape: tuple[int, ...] | None = None,
    ood: Sequence[str] = (),
    validation_ood: Sequence[str] = (),
    record: DataRecord | None = None,
    reserve: bool = True,
    seed: int = 0,
) -> Splits:
    """The splits of a named set, a folder of class folders, or a `package.module:callable` returning `Splits`.

    Args:
        name: see `compress-uq methods`, or a folder with class folders (below train/, val/, test/ or not).
        root: where the named sets lie or are downloaded to.
        mean, std: per channel, of pixels in 0..1; by default those of the set.
        input_shape: (C, H, W) that images of a folder are brought to; by default their own size.
        ood: out-of-distribution sets to report on: names or folders.
        validation_ood: others, on which a score may be chosen; those made of other images are made of held-out ones.
        record: what the checkpoint remembers of its training data; None for weights from elsewhere.
        reserve: set calibration images aside; False leaves the test split whole, for a model that is only measured.
        seed: draws the splits that are drawn.

    Raises:
        DataError: the set is unknown, missing or unusable.
    """
    if ":" in name and not Path(name).exists():
        splits, default_ood = _from_callable(name, mean, std), tuple[str, ...]()
    else:
        source = _read(name, Path(root), mean, std, input_shape)
        splits, default_ood = source.splits(), source.ood
    if reserve:
        splits = _calibration_rule(splits, record, seed)
    return _with_ood(splits, ood or default_ood, validation_ood, Path(root))


def check_data_names(data: str, ood: Sequence[str]) -> None:
    """Refuse, before anything is read, words that name no set; a path or a callable may come to be there.

    Raises:
        UnknownNameError: names the nearest.
    """
    foreign = (*MADE_SETS.names, *DATASETS.names, "a folder")
    references = [("data set or folder", data, DATASETS.names), *(("out-of-distribution set", n, foreign) for n in ood)]
    for kind, name, known in references:
        if name not in known and not set(":/\\") & set(name) and not Path(name).exists():
            raise UnknownNameError(kind, name, known)


def hold_out(splits: Splits, *, seed: int = 0) -> Splits:
    """Set a class-balanced tenth of the training set aside for calibration, before a model is trained.

    Raises:
        DataError: there is no training set.
    """
    train = splits.require("train", "training")
    chosen, rest = take_class_balanced(labels_of(train), HELD_OUT_FRACTION, seed)
    info = replace(
        splits.info,
        calibration=f"{len(chosen)} training images held out of the training of the dense model",
        held_out=tuple(chosen),
    )
    return replace(splits, train=Subset(train, rest), calibration=Subset(train, chosen), info=info)


def _calibration_rule(splits: Splits, record: DataRecord | None, seed: int) -> Splits:
    """Calibration images for splits that bring none."""
    info, train, test = splits.info, splits.train, splits.test
    if splits.calibration is not None or test is None:
        return splits
    if train is not None and record is not None and record.held_out and record.fingerprint == info.fingerprint:
        chosen = set(record.held_out)
        rest = [i for i in range(len(train)) if i not in chosen]  # type: ignore[arg-type]
        info = replace(
            info,
            calibration=f"{len(chosen)} training images that the checkpoint records as held out of its training",
            held_out=record.held_out,
        )
        return replace(splits, train=Subset(train, rest), calibration=Subset(train, sorted(chosen)), info=info)
    chosen_test, rest_test = take_class_balanced(labels_of(test), 0.2, seed)
    info = replace(
        info,
        calibration=f"a class-balanced fifth of the test split ({len(chosen_test)} images), since no training of these "
        f"weights on these data is recorded; figures are on the other {len(rest_test)}",
        calibration_from_test=True,
    )
    return replace(splits, calibration=Subset(test, chosen_test), test=Subset(test, rest_test), info=info)


def _read(
    name: str,
    root: Path,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    input_shape: tuple[int, ...] | None,
) -> _Source:
    if name in DATASETS:
        known = DATASETS[name]
        normalisation = (tuple(mean or known.mean), tuple(std or known.std))
        parts = [ImageTensors(*known.read(root, train), *normalisation) for train in (True, False)]
        return _Source(name, parts[0], parts[1], known.labels, normalisation, known.augment, known.ood)
    if Path(name).is_dir():
        return _read_folder(Path(name), mean, std, input_shape)
    raise UnknownNameError("data set or folder", name, DATASETS.names)


def _read_folder(
    folder: Path, mean: Sequence[float] | None, std: Sequence[float] | None, input_shape: tuple[int, ...] | None
) -> _Source:
    parts = {part: folder / part for part in ("train", "val", "test", "calibration") if (folder / part).is_dir()}
    listed = {part: class_folders(path) for part, path in parts.items()} or {"all": class_folders(folder)}
    first = next(iter(listed.values()))
    for part, (_, _, names) in listed.items():
        if names != first[2]:
            raise DataError(f"{folder / part} has the classes {', '.join(names)}: expected {', '.join(first[2])}")
    shape = input_shape or shape_of_images(first[0])
    default = default_normalisation(shape[0])
    normalisation = (tuple(mean or default[0]), tuple(std or default[1]))

    def dataset(part: str) -> ImageFiles:
        files, targets, _ = listed[part]
        return ImageFiles(files, targets, shape, normalisation)

    if "all" in listed:
        return _divide_folder(folder.name, listed["all"], shape, normalisation)
    if "train" not in listed or not {"val", "test"} & set(listed):
        raise DataError(f"{folder} has {', '.join(listed)}: expected train and test (or val), or class folders alone")
    test = "test" if "test" in listed else "val"
    calibration = next((p for p in ("calibration", "val") if p in listed and p != test), None)
    notes = ("val is the calibration split: it must not have chosen an epoch",) if calibration == "val" else ()
    return _Source(
        folder.name,
        dataset("train"),
        dataset(test),
        first[2],
        normalisation,
        "none",
        calibration=None if calibration is None else dataset(calibration),
        notes=notes,
    )


def _divide_folder(
    name: str, listed: tuple[list[Path], list[int], tuple[str, ...]], shape: tuple[int, ...], norm: Normalisation
) -> _Source:
    """A folder without parts: a class-balanced fifth of it, the same every time, is the test split."""
    files, targets, names = listed
    everything = ImageFiles(files, targets, shape, norm)
    test, train = take_class_balanced(labels_of(everything), TEST_FRACTION, seed=0)

    def part(indices: list[int]) -> ImageFiles:
        return ImageFiles([files[i] for i in indices], [targets[i] for i in indices], shape, norm)

    note = f"{name} has no test folder: a class-balanced fifth of it is the test split"
    return _Source(name, part(train), part(test), names, norm, "none", notes=(note,))


def _from_callable(name: str, mean: Sequence[float] | None, std: Sequence[float] | None) -> Splits:
    """The caller's splits; their images are fed as they come, and mean and std are only recorded."""
    splits = import_callable(name, "data")()
    if not isinstance(splits, Splits):
        raise DataError(f"data {name!r} returned {type(splits).__name__}: expected compress_uq.Splits")
    info = splits.info
    known = name if info.name == DataInfo.name else info.name
    fingerprint = info.fingerprint
    if fingerprint is None and splits.train is not None:
        fingerprint = hashlib.sha256(labels_of(splits.train).numpy().tobytes()).hexdigest()
    recorded = (tuple(mean) if mean else info.mean, tuple(std) if std else info.std)
    info = replace(info, name=known, fingerprint=fingerprint, mean=recorded[0], std=recorded[1])
    return replace(splits, info=info)


def _with_ood(splits: Splits, names: Sequence[str], validation: Sequence[str], root: Path) -> Splits:
    """The sets that figures are reported on, made from test images where they are made, and those that are not."""
    if names:
        test = splits.require("test", "an out-of-distribution figure")
        splits = replace(splits, ood=_sets(splits, names, splits.ood, test, root))
    if validation:
        held_out = splits.decision or splits.calibration or splits.require("test", "an out-of-distribution set")
        for name in validation:
            if name in splits.ood:
                raise DataError(
                    f"--validation-ood {name} is reported on too: a score is not chosen on what it is "
                    "measured on, pass another set"
                )
        splits = replace(splits, validation_ood=_sets(splits, validation, splits.validation_ood, held_out, root))
    return splits


def _sets(
    splits: Splits, names: Sequence[str], known: Mapping[str, ImageDataset], images: ImageDataset, root: Path
) -> dict[str, ImageDataset]:
    """The known sets and those that are named, in the form of the images."""
    info = splits.info
    normalisation = None if info.mean is None or info.std is None else (info.mean, info.std)
    shape = tuple(images[0][0].shape)
    sets = dict(known)
    for reference in names:
        name, dataset = ood_set(reference, test=images, shape=shape, normalisation=normalisation, root=root)
        if name in sets:
            raise DataError(f"two out-of-distribution sets are called {name!r}: rename a folder")
        sets[name] = dataset
    return sets
