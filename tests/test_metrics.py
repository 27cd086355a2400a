"""Metrics against netcal, scikit-learn, a slow reading of the definition, and values by hand."""

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, log_loss, roc_auc_score

from compress_uq import metrics as m
from compress_uq.errors import DataError, InputError
from compress_uq.metrics.bootstrap import RESAMPLES


def draw(n=400, k=5, seed=0, sharpness=2.0):
    random = np.random.default_rng(seed)
    logits = random.normal(size=(n, k)) * sharpness
    labels = (logits + random.normal(size=(n, k)) * sharpness).argmax(1)
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True), labels


def slow_ause(p, y, u):
    """Algorithm 1 with its sign corrected, mask by mask."""
    wrong = p.argmax(1) != y
    oracle = 1 - p[np.arange(len(y)), y]
    difference = []
    for q in range(0, 100, 2):
        kept = u <= np.percentile(u, 100 - q)
        best = oracle <= np.percentile(oracle, 100 - q)
        difference.append(wrong[kept].mean() - wrong[best].mean())
    return sum((a + b) / 2 * 0.02 for a, b in zip(difference[:-1], difference[1:], strict=True))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bins", [10, 15])
def test_ece_equals_netcal(seed, bins):
    netcal, (p, y) = pytest.importorskip("netcal.metrics"), draw(seed=seed)
    assert m.ece(p, y, bins=bins) == pytest.approx(netcal.ECE(bins).measure(p, y), abs=1e-9)


def test_ece_by_hand():
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.45, 0.55]])
    y = np.array([0, 1, 0, 1])
    # Bins of ten: {.9, .9} accuracy .5, {.6} right, {.55} right.
    assert m.ece(p, y, bins=10) == pytest.approx((2 * 0.4 + 0.4 + 0.45) / 4)


def test_edges_belong_to_the_bin_above():
    bins = m.reliability(np.array([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]), np.array([0, 1]), bins=10)
    assert bins.count[5] == 1
    assert bins.count[9] == 1


@pytest.mark.parametrize("seed", range(3))
def test_classification_metrics_equal_scikit_learn(seed):
    p, y = draw(seed=seed)
    assert m.accuracy(p, y) == pytest.approx((p.argmax(1) == y).mean())
    assert m.nll(p, y) == pytest.approx(log_loss(y, p, labels=range(5)))
    assert m.f1_macro(p, y) == pytest.approx(f1_score(y, p.argmax(1), average="macro"))
    assert m.brier(p, y) == pytest.approx(((p - np.eye(5)[y]) ** 2).sum(1).mean())
    per_class = m.per_class_accuracy(p, y)
    assert per_class == pytest.approx([(p.argmax(1) == y)[y == k].mean() for k in range(5)])


@pytest.mark.parametrize("seed", range(4))
def test_ause_equals_the_mask_loop(seed):
    p, y = draw(seed=seed)
    assert m.ause(p, y) == pytest.approx(slow_ause(p, y, 1 - p.max(1)), abs=1e-12)
    u = np.random.default_rng(seed).normal(size=len(y)).round(1)  # with ties
    assert m.ause(p, y, u) == pytest.approx(slow_ause(p, y, u), abs=1e-12)


def test_golden_values_of_real_predictions(real_data):
    golden = {
        "cifar100-densenet-bc-100": (0.03770, 0.142153, 0.07088),
        "cifar100-wideresnet-16-4": (0.03804, None, 0.07223),
    }
    for name, (ause, ece, aurc) in golden.items():
        data = np.load(real_data / "predictions" / f"{name}.npz")
        p, y = data["predictions"], data["ground_truth"]
        assert m.ause(p, y) == pytest.approx(ause, rel=1.3e-4)
        assert m.aurc(p, y) == pytest.approx(aurc, rel=2e-4)
        assert m.ause_exact(p, y) == pytest.approx(m.ause(p, y), rel=0.01)
        if ece is not None:
            assert m.ece(p, y) == pytest.approx(ece, abs=5e-7)
        literal = m.ause(p, y, p.max(1))  # most uncertain kept: what the printed sign would give
        assert literal > 5 * ause


def test_aurc_by_hand():
    # Published closed form: errors 0 0 1 1 0 by confidence .1 .2 .3 .4 .2, here as mean of risks with ties averaged.
    p = np.array([[0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    y = np.array([0, 1, 0])
    # Sorted by confidence: right, wrong, right: risks 0, 1/2, 1/3.
    assert m.aurc(p, y) == pytest.approx((0 + 1 / 2 + 1 / 3) / 3)
    tied = np.full((2, 2), 0.5)
    assert m.aurc(tied, np.array([0, 1])) == pytest.approx((0.5 + 0.5) / 2)


def test_ties_are_averaged_over_their_orders():
    p, y = draw(60)
    u = np.round(1 - p.max(1), 1)
    random = np.random.default_rng(0)
    wrong = p.argmax(1) != y
    values = []
    for _ in range(4000):
        order = np.lexsort((random.random(60), u))
        values.append((np.cumsum(wrong[order]) / np.arange(1, 61)).mean())
    assert m.aurc(p, y, u) == pytest.approx(np.mean(values), abs=4 * np.std(values) / 60)


@pytest.mark.parametrize("shift", [0, 30, -30])
def test_auroc_equals_scikit_learn_wherever_the_scores_lie(shift):
    random = np.random.default_rng(1)
    low, high = random.normal(size=300).round(1), (random.normal(size=200) + 0.8).round(1)
    truth = np.r_[np.zeros(300), np.ones(200)]
    assert m.ood_auroc(low + shift, high + shift) == pytest.approx(roc_auc_score(truth, np.r_[low, high]))
    assert m.ood_auroc(high, low) == pytest.approx(1 - m.ood_auroc(low, high))


def test_error_auroc_and_accuracy_at():
    p, y = draw()
    wrong = p.argmax(1) != y
    assert m.error_auroc(p, y) == pytest.approx(roc_auc_score(wrong, 1 - p.max(1)))
    order = np.argsort(1 - p.max(1))[:200]
    assert m.accuracy_at(p, y) == pytest.approx(1 - wrong[order].mean())
    assert np.isnan(m.error_auroc(np.eye(3), np.arange(3)))


def test_fpr95_by_hand():
    # 95 % of 20 OOD scores are flagged at the second lowest, 2: two of four in-distribution scores are as high.
    assert m.ood_fpr95([0, 1, 2, 3], np.arange(1, 21)) == 0.5
    assert m.ood_fpr95([0.0, 0.1], [1.0, 2.0]) == 0.0
    assert m.ood_fpr95([5.0, 6.0], [1.0, 2.0]) == 1.0
    assert m.ood_aupr([0.0, 0.1], [1.0, 2.0]) == 1.0


def test_random_ause_is_what_noise_scores():
    p, y = draw(2000)
    random = np.random.default_rng(0)
    noise = [m.ause(p, y, random.random(2000)) for _ in range(200)]
    assert m.random_ause(p, y) == pytest.approx(np.mean(noise), abs=4 * np.std(noise) / np.sqrt(200) + 1e-4)


def test_tensors_and_arrays_agree():
    p, y = draw()
    assert m.ause(torch.from_numpy(p), torch.from_numpy(y)) == m.ause(p, y)


def test_intervals_contain_their_figures_and_cover():
    p, y = draw(500)
    figures = m.classification_figures(p, y, 1 - p.max(1))
    assert all(f.low <= f.value <= f.high for f in figures.values())
    accuracy = figures["accuracy"]
    half = 1.96 * np.sqrt(accuracy.value * (1 - accuracy.value) / 500)
    assert accuracy.high - accuracy.value == pytest.approx(half, rel=0.25)
    assert RESAMPLES == 1000


def test_figures_equal_the_functions():
    p, y = draw(300)
    figures = m.classification_figures(p, y, 1 - p.max(1))
    for name in ("accuracy", "nll", "brier", "ece", "ause", "ause_exact", "aurc", "error_auroc", "f1_macro"):
        assert figures[name].value == pytest.approx(getattr(m, name)(p, y)), name
    assert figures["accuracy_at_50"].value == pytest.approx(m.accuracy_at(p, y))


@pytest.mark.parametrize(
    "call",
    [
        lambda: m.ece(np.full((2, 3), np.nan), [0, 1]),
        lambda: m.ece(np.ones((2, 3)) / 3, [0]),
        lambda: m.ece(np.ones((2, 3)) / 3, [0, 3]),
        lambda: m.ood_auroc([], [1.0]),
    ],
)
def test_bad_arrays_are_refused(call):
    with pytest.raises(DataError):
        call()


def test_bad_arguments_are_refused():
    p, y = draw(10)
    with pytest.raises(InputError, match="bins=0"):
        m.ece(p, y, bins=0)
    with pytest.raises(InputError, match="retained=2"):
        m.accuracy_at(p, y, retained=2)
    with pytest.raises(InputError, match="3 values"):
        m.ause(p, y, [1, 2, 3])
