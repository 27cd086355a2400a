"""Splits, the calibration rule, named sets, folders and out-of-distribution sets."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset, TensorDataset

import compress_uq as cuq
from compress_uq.data import (
    AUGMENTATIONS,
    DATASETS,
    DataInfo,
    ImageTensors,
    batches,
    fit_images,
    identical_images,
    labels_of,
    ood_set,
    take_class_balanced,
)  # fmt: skip
from compress_uq.errors import DataError, UnknownNameError


def tensors(count=20, classes=4, seed=0, shape=(1, 8, 8)):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, *shape, generator=generator), torch.arange(count) % classes)


def test_an_empty_or_missing_split_is_named():
    with pytest.raises(DataError, match="'test' is empty"):
        cuq.Splits(test=Subset(tensors(), []))
    with pytest.raises(DataError, match="needs the split 'test', and the splits given are: train"):
        cuq.Splits(train=tensors()).require("test", "evaluate")
    with pytest.raises(DataError, match="all missing"):
        cuq.Splits().example()


def test_one_index_in_two_splits_is_refused_and_one_image_twice_is_counted():
    base = tensors()
    with pytest.raises(DataError, match="index 4 is in the splits 'train' and 'test'"):
        cuq.Splits(train=Subset(base, [1, 4]), test=Subset(Subset(base, [3, 4]), [1]))
    with pytest.raises(DataError, match="index 0"):
        cuq.Splits(train=base, test=base)
    same = TensorDataset(base.tensors[0].clone(), base.tensors[1])
    splits = cuq.Splits(train=Subset(base, range(10)), calibration=Subset(same, [2, 15]), test=Subset(same, [9, 16]))
    assert identical_images(splits) == {"train/calibration": 1, "train/test": 1}


def test_identical_images_of_pneumoniamnist(real_data):
    data = np.load(real_data / "medmnist" / "pneumoniamnist.npz")
    parts = {
        p: ImageTensors(
            torch.from_numpy(data[f"{p}_images"]).unsqueeze(1),
            torch.from_numpy(data[f"{p}_labels"][:, 0]),
            (0.5,),
            (0.5,),
        )
        for p in ("train", "val", "test")
    }
    counts = identical_images(cuq.Splits(train=parts["train"], calibration=parts["val"], test=parts["test"]))
    assert sum(counts.values()) == 8


def test_class_balanced_choice():
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 3)
    taken, rest = take_class_balanced(labels, 0.2, seed=0)
    assert torch.bincount(labels[taken]).tolist() == [10, 2, 1]
    assert sorted(taken + rest) == list(range(63))
    assert take_class_balanced(labels, 0.2, seed=0)[0] == taken
    assert take_class_balanced(labels, 0.2, seed=1)[0] != taken
    with pytest.raises(DataError, match="single image"):
        take_class_balanced(torch.tensor([0, 0, 1]), 0.2, 0)


def test_weights_of_unknown_training_take_a_fifth_of_the_test_split():
    splits = cuq.load_splits("digits")
    whole = cuq.load_splits("digits", reserve=False)
    assert whole.calibration is None
    assert len(splits.calibration) + len(splits.test) == len(whole.test)
    assert len(splits.train) == len(whole.train)
    counts = torch.bincount(labels_of(splits.calibration))
    assert len(counts) == 10
    assert counts.max() - counts.min() <= 1
    assert splits.info.calibration_from_test
    assert "fifth of the test split" in splits.info.calibration


def test_a_checkpoint_of_ours_gives_its_held_out_tenth(dense):
    splits = cuq.load_splits("digits", record=dense.data)
    assert list(splits.calibration.indices) == sorted(dense.data.held_out)
    assert set(splits.train.indices).isdisjoint(dense.data.held_out)
    assert len(splits.train) + len(splits.calibration) == len(cuq.load_splits("digits", reserve=False).train)
    assert len(splits.test) == len(cuq.load_splits("digits", reserve=False).test)
    other = cuq.models.DataRecord("digits", "another fingerprint", dense.data.held_out)
    assert cuq.load_splits("digits", record=other).info.calibration_from_test


def test_digits_are_whole_and_bring_ood_sets():
    splits = cuq.load_splits("digits", reserve=False)
    assert len(splits.train) + len(splits.test) == 1797
    assert list(splits.ood) == ["photographs", "shuffled-pixels"]
    images = torch.stack([splits.train[i][0] for i in range(len(splits.train))])
    assert images.mean().abs() < 0.02
    assert images.std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("name", "folder", "counts"),
    [("mnist", "MNIST", (60_000, 10_000)), ("fashion-mnist", "FashionMNIST", (60_000, 10_000))],
)
def test_named_sets_through_torchvision(real_data, tmp_path, name, folder, counts):
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    for packed in (real_data / folder / "raw").glob("*.gz"):
        (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    splits = cuq.load_splits(name, root=tmp_path, reserve=False)
    assert (len(splits.train), len(splits.test)) == counts
    image, label = splits.train[0]
    assert image.shape == (1, 28, 28)
    assert label == labels_of(splits.train)[0]
    known = DATASETS[name]
    pixels = splits.train.pixels[:10_000].float() / 255
    assert pixels.mean().item() == pytest.approx(known.mean[0], abs=0.005)
    assert pixels.std().item() == pytest.approx(known.std[0], abs=0.005)


def test_a_set_that_is_not_there_says_where_it_was_looked_for(tmp_path, monkeypatch):
    import torchvision

    def offline(self):
        Path(self.raw_folder).mkdir(parents=True)
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", offline)
    with pytest.raises(DataError, match="MNIST is not under .*no route to host.*--data-root"):
        cuq.load_splits("mnist", root=tmp_path / "data")
    assert not list(tmp_path.iterdir())


def write_images(folder, classes=("cat", "dog"), count=6, size=(10, 10), mode="RGB", seed=0):
    random = np.random.default_rng(seed)
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            shape = (*size, 3) if mode == "RGB" else size
            pixels = random.integers(0, 100, shape) + 100 * number
            Image.fromarray(pixels.astype(np.uint8), mode).save(folder / name / f"{i}.png")


def test_class_folders_with_and_without_parts(tmp_path):
    write_images(tmp_path / "flat", count=10)
    flat = cuq.load_splits(str(tmp_path / "flat"))
    assert (len(flat.train), len(flat.calibration), len(flat.test)) == (16, 2, 2)
    assert flat.info.labels == ("cat", "dog")
    assert "no test folder" in flat.info.notes[0]
    for part in ("train", "val", "test"):
        write_images(tmp_path / "parts" / part, seed=len(part))
    parts = cuq.load_splits(str(tmp_path / "parts"))
    assert (len(parts.train), len(parts.calibration), len(parts.test)) == (12, 12, 12)
    assert parts.test[0][0].shape == (3, 10, 10)
    resized = cuq.load_splits(str(tmp_path / "parts"), input_shape=(1, 16, 16), mean=(0.0,), std=(1.0,))
    assert resized.test[0][0].shape == (1, 16, 16)
    assert 0 <= resized.test[0][0].min() <= resized.test[0][0].max() <= 1


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "one" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="1 class folders"):
        cuq.load_splits(str(tmp_path / "one"))
    (tmp_path / "one" / "dog").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        cuq.load_splits(str(tmp_path / "one"))
    write_images(tmp_path / "two" / "train")
    write_images(tmp_path / "two" / "test", classes=("cat", "cow"))
    with pytest.raises(DataError, match="cat, cow"):
        cuq.load_splits(str(tmp_path / "two"))
    with pytest.raises(UnknownNameError, match="did you mean 'cifar10'"):
        cuq.load_splits("cifar1")
    with pytest.raises(DataError, match="mean has 2 values"):
        cuq.load_splits("digits", mean=(0.1, 0.2), std=(1.0,))


def test_a_broken_image_is_named(tmp_path):
    write_images(tmp_path)
    (tmp_path / "cat" / "0.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(DataError, match=r"0\.png is not an image"):
        cuq.load_splits(str(tmp_path))


def test_ood_sets_look_like_the_data(tmp_path):
    test = cuq.load_splits("digits", reserve=False).test
    write_images(tmp_path / "far", size=(20, 30))
    common = {"test": test, "shape": (1, 8, 8), "normalisation": ((0.305,), (0.376,)), "root": tmp_path}
    for reference in ("synthetic", "photographs", "shuffled-pixels", "digits", str(tmp_path / "far")):
        name, dataset = ood_set(reference, **common)
        assert name == reference.rpartition("/")[2]
        assert dataset[3][0].shape == (1, 8, 8)
        assert torch.equal(dataset[3][0], dataset[3][0]), "the same image each time"
    patched = ood_set("synthetic", **common)[1][5][0]
    assert torch.equal(patched.flatten().sort().values, test[5][0].flatten().sort().values)
    assert not torch.equal(patched, test[5][0])
    with pytest.raises(UnknownNameError, match="synthetic"):
        ood_set("synthetics", **common)
    with pytest.raises(DataError, match="--mean"):
        ood_set("photographs", **{**common, "normalisation": None})


def test_images_are_brought_to_another_shape():
    grey = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)
    assert torch.equal(fit_images(grey, (3, 8, 8))[0, 2], grey[0, 0])
    colour = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert fit_images(colour, (1, 4, 4)).unique().tolist() == [76]
    assert fit_images(torch.full((1, 1, 28, 28), 9, dtype=torch.uint8), (1, 8, 8)).unique().tolist() == [9]
    with pytest.raises(DataError, match="4 channels"):
        fit_images(torch.zeros(1, 4, 8, 8, dtype=torch.uint8), (3, 8, 8))


def test_batches_are_checked():
    bad = tensors()
    bad.tensors[0][7] = float("nan")
    with pytest.raises(DataError, match="batch 1 hold NaN"):
        list(batches(bad, 5))
    with pytest.raises(DataError, match="pairs"):
        list(batches(torch.zeros(4, 2), 2))


def test_labels_out_of_range(dense):
    wrong = TensorDataset(torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 10, 2]))
    with pytest.raises(DataError, match="label 10 is out of range: the model has 10 classes, 0 to 9"):
        cuq.evaluate(dense.model, cuq.Splits(test=wrong))
    with pytest.raises(DataError, match="label 10"):
        cuq.finetune(dense.model, cuq.Splits(train=wrong), epochs=1)


@pytest.mark.parametrize("name", AUGMENTATIONS.names)
def test_augmentations_keep_shape_and_are_reproducible(name):
    images = torch.randn(16, 3, 12, 10)
    one, two = (AUGMENTATIONS[name](images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert one.shape == images.shape
    assert torch.equal(one, two)
    assert torch.equal(one, images) == (name == "none")


def test_crop_shifts_and_flip_mirrors():
    images = torch.arange(64.0).view(1, 1, 8, 8).repeat(200, 1, 1, 1)
    flipped = AUGMENTATIONS["flip"](images, torch.Generator().manual_seed(0))
    mirrored = (flipped[:, 0, 0, 0] == 7).float().mean().item()
    assert mirrored == pytest.approx(0.5, abs=0.15)
    shifted = AUGMENTATIONS["crop"](images, torch.Generator().manual_seed(0))
    assert sorted(shifted[:, 0, 4, 4].unique().tolist()) == sorted(
        36 + 8 * dy + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1)
    )


def test_callers_data_by_reference(tmp_path, monkeypatch):
    (tmp_path / "user_data.py").write_text(
        "import torch, compress_uq as cuq\nfrom torch.utils.data import TensorDataset as T\n"
        "def splits():\n    t = lambda n, s: T(torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(s)), torch.arange(n) % 3)\n"
        "    return cuq.Splits(train=t(30, 0), test=t(30, 1))\n"
        "def nothing():\n    return 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    splits = cuq.load_splits("user_data:splits")
    assert splits.info.name == "user_data:splits"
    assert (len(splits.calibration), len(splits.test)) == (6, 24)
    record = cuq.models.DataRecord("user_data:splits", splits.info.fingerprint, (0, 1, 2))
    assert len(cuq.load_splits("user_data:splits", record=record).calibration) == 3
    with pytest.raises(DataError, match="returned int"):
        cuq.load_splits("user_data:nothing")
    assert DataInfo().name != splits.info.name
