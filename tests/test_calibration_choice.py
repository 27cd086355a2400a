"""Which calibrator `auto` takes: the one that the data were distorted by, and the simplest where it makes no difference."""

import json

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

import compress_uq as cuq
from compress_uq.calibration import CALIBRATORS, choose, fit_calibrator
from compress_uq.calibration.images import spread_folds
from compress_uq.errors import CalibrationError, UnknownNameError
from test_calibration import draw, labels_of


def shifted():
    random = np.random.default_rng(0)
    right = random.normal(size=(1, 3000, 4)) * 2
    return right - np.array([0, 1.5, 0, -1.5]), labels_of(softmax(right[0], 1), random)


def confused():
    """What class 0 gets belongs in part to class 1, which no scale or bias per class can tell."""
    random = np.random.default_rng(0)
    logits = random.normal(size=(1, 3000, 3)) * 2
    matrix = np.array([[1.0, 0, 0], [1.5, 1, 0], [0, 0, 1]])
    return logits, labels_of(softmax(log_softmax(logits[0], 1) @ matrix.T, 1), random)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (draw(scale=1.0, count=3000, classes=4), "none"),
        (draw(scale=3.0, count=3000, classes=4), "temperature"),
        (draw(scale=3.0, count=1000, classes=4, members=5), "temperature"),
        (shifted(), "vector"),
        (confused(), "dirichlet"),
    ],
    ids=["calibrated", "too sure", "members", "shifted", "confused"],
)
def test_the_choice_is_what_the_data_were_distorted_by(given, expected):
    pytest.importorskip("netcal")
    choice = choose(*given)
    assert choice.name == expected
    assert set(choice.nll) == set(CALIBRATORS.names)
    assert not choice.skipped
    gap, error = choice.behind[expected]
    assert gap <= error or gap == 0
    assert min(choice.nll.values()) + gap == pytest.approx(choice.nll[expected])
    assert json.loads(json.dumps(choice.to_json()))["name"] == expected
    assert choose(*given) == choice


def test_folds_hold_every_class_as_evenly_as_it_goes():
    labels = np.repeat([0, 1, 2], [11, 7, 2])
    fold = spread_folds(labels, 5, seed=3)
    assert np.bincount(fold).tolist() == [4] * 5
    for k in range(3):
        counts = np.bincount(fold[labels == k], minlength=5)
        assert counts.max() - counts.min() <= 1
    assert not np.array_equal(fold, spread_folds(labels, 5, seed=4))


def test_candidates_that_cannot_be_fitted_are_skipped_and_said_so():
    pytest.importorskip("netcal")
    logits, labels = draw(count=400)
    without = labels != 2
    choice = choose(logits[:, without], labels[without])
    assert choice.name == "temperature"
    assert set(choice.skipped) == {"vector", "beta", "histogram", "isotonic", "dirichlet"}
    assert all("none of class 2" in reason for reason in choice.skipped.values())
    perfect = choose(np.eye(3)[None].repeat(20, 1) * 5, np.repeat(np.arange(3), 20))
    assert "no temperature fits" in perfect.skipped["temperature"]


def test_auto_is_fitted_on_all_images_and_keeps_how_it_was_chosen():
    logits, labels = draw(scale=3.0, count=1000)
    fitted = fit_calibrator("auto", logits, labels)
    by_name = fit_calibrator("temperature", logits, labels)
    assert fitted.name == "temperature"
    assert fitted.temperature == by_name.temperature
    assert fitted.choice == choose(logits, labels).to_json()
    assert by_name.choice is None
    with pytest.raises(UnknownNameError, match="auto"):
        fit_calibrator("autoo", logits, labels)
    with pytest.raises(CalibrationError, match="4 calibration images for 6 classes"):
        fit_calibrator("auto", logits[:, :4], labels[:4])


def test_auto_on_public_logits_is_calibrated(real_data):
    """A class-balanced fifth of CIFAR-10's test split, and the rest: ECE as a good temperature gives it."""
    stored = np.load(real_data / "cifar10" / "test_logits.npz")
    labels = np.load(real_data / "cifar10" / "cifar10h.npz")["counts"].argmax(1)
    fifth = spread_folds(labels, 5, seed=0) == 0
    for name in ("vgg_15_BN_64", "resnet_basic_110"):
        logits = stored[name][None]
        fitted = fit_calibrator("auto", logits[:, fifth], labels[fifth])
        q = cuq.calibration.choice.calibrated(fitted, logits[:, ~fifth])
        assert cuq.metrics.ece(softmax(logits[0, ~fifth], 1), labels[~fifth]) > 0.035
        assert cuq.metrics.ece(q, labels[~fifth]) < 0.012
