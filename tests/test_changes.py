"""What the card says of classes and of calibration, before and after."""

import numpy as np
import pytest
from scipy.stats import binom

import compress_uq as cuq
from compress_uq.report import class_changes, lost_classes
from compress_uq.report.evaluation import Cost, Evaluation
from compress_uq.types import Prediction


def evaluation(labels, predicted, names=("cat", "dog")):
    p = np.eye(len(names))[predicted] * 0.8 + 0.1
    per_class = {}
    for number, name in enumerate(names):
        share = float((predicted[labels == number] == number).mean())
        per_class[name] = cuq.metrics.Figure(share, share, share)
    answers = Prediction(p, predicted, p.max(1), 1 - p.max(1), *(np.zeros(len(labels)),) * 4)
    return Evaluation({}, {}, per_class, Cost(1, 1, 1), answers, labels, {})


def test_a_class_that_was_lost_is_named():
    labels = np.repeat([0, 1], 50)
    before, after = labels.copy(), labels.copy()
    after[:12] = 1  # 12 cats lost
    before[50:53], after[60:64] = 0, 0  # 3 dogs gained, 4 lost
    cat, dog = rows = class_changes(evaluation(labels, before), evaluation(labels, after))
    assert (cat["lost"], cat["gained"], dog["lost"], dog["gained"]) == (12, 0, 4, 3)
    assert cat["change"] == pytest.approx(-12 / 50)
    # Exact McNemar: of the images that one of both gets right, how extreme a split of even odds.
    assert cat["p_value"] == pytest.approx(2 * 0.5**12)
    assert dog["p_value"] == pytest.approx(min(1.0, 2 * binom.sf(3, 7, 0.5)))
    (warning,) = lost_classes(rows)
    assert "cat 1.000 to 0.760" in warning
    assert "dog" not in warning


def test_classes_within_chance_are_not_named():
    labels = np.repeat([0, 1], 50)
    after = labels.copy()
    after[:4] = 1
    assert lost_classes(class_changes(evaluation(labels, labels), evaluation(labels, after))) == []
