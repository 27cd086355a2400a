"""Weighted images are images repeated: every figure of a resample is that of the rows it drew."""

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from compress_uq import metrics as m
from compress_uq.metrics import bootstrap, order
from compress_uq.metrics.arrays import checked
from test_metrics import draw

RANDOM = np.random.default_rng


def tied(seed, n=300):
    """Scores with many ties, and which images are positive."""
    random = RANDOM(seed)
    return random.normal(size=n).round(1), random.random(n) < 0.3


def repeated(scores, positive, weights):
    return order.Ranking(np.repeat(scores, weights), np.repeat(positive, weights)).weighed()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_a_resample_scores_as_the_rows_it_drew(seed, ties):
    p, y = draw(400, seed=seed)
    u = (1 - p.max(1)).round(1) if ties else RANDOM(seed).random(400)
    counts = bootstrap._resample(RANDOM(seed), 400)
    rows = np.repeat(np.arange(400), counts)
    assert counts.min() == 0
    assert counts.max() > 1
    of_weights = bootstrap._Images(checked(p, y), u).metrics(counts)
    assert of_weights == pytest.approx(m.classification_metrics(p[rows], y[rows], u[rows]), rel=1e-11)


@pytest.mark.parametrize("seed", range(5))
def test_any_weights_are_repetitions(seed):
    scores, positive = tied(seed)
    weights = RANDOM(seed).integers(0, 4, len(scores))
    ours, rows = order.Ranking(scores, positive).weighed(weights), repeated(scores, positive, weights)
    k = np.arange(1, weights.sum() + 1)
    assert np.array_equal(ours.positives_among(k), rows.positives_among(k))
    assert np.array_equal(ours.shares_kept(), rows.shares_kept())
    assert ours.area() == pytest.approx(rows.area(), rel=1e-12)
    assert ours.auroc() == rows.auroc()
    assert ours.average_precision() == pytest.approx(rows.average_precision(), rel=1e-12)
    assert ours.false_positive_rate(0.95) == rows.false_positive_rate(0.95)


@pytest.mark.parametrize("seed", range(5))
def test_weighted_figures_equal_scikit_learn(seed):
    scores, positive = tied(seed)
    weights = RANDOM(seed).integers(0, 4, len(scores))
    ours = order.Ranking(scores, positive).weighed(weights)
    assert ours.auroc() == pytest.approx(roc_auc_score(positive, scores, sample_weight=weights))
    assert ours.average_precision() == pytest.approx(average_precision_score(positive, scores, sample_weight=weights))
    fpr, tpr, _ = roc_curve(positive, scores, sample_weight=weights, drop_intermediate=False)
    assert ours.false_positive_rate(0.95) == pytest.approx(fpr[np.argmax(tpr >= 0.95 - 1e-12)])


@pytest.mark.parametrize("seed", range(5))
def test_curves_are_those_of_masks_and_percentiles_to_the_bit(seed):
    scores, positive = tied(seed)
    scores = scores if seed % 2 else RANDOM(seed).normal(size=len(scores))
    curve = order.Ranking(scores, positive).weighed().shares_kept()
    assert curve.tolist() == [positive[scores <= np.percentile(scores, 100 - q)].mean() for q in range(0, 100, 2)]


def test_shares_of_ties_are_the_mean_over_their_orders():
    scores, positive = np.array([0.0, 1, 1, 1, 2]), np.array([False, True, False, True, True])
    ours = order.Ranking(scores, positive).weighed()
    assert ours.positives_among(np.arange(1, 6)).tolist() == pytest.approx([0, 2 / 3, 4 / 3, 2, 3])
    assert ours.area() == pytest.approx((0 + 1 / 3 + 4 / 9 + 1 / 2 + 3 / 5) / 5)


def test_no_positives_and_nothing_else():
    scores = np.array([1.0, 2.0, 2.0])
    none, all_ = (order.Ranking(scores, np.full(3, value)).weighed() for value in (False, True))
    assert (none.area(), all_.area()) == (0, pytest.approx(1))
    assert none.positives_among(np.array([1, 3])).tolist() == [0, 0]
    assert all_.positives_among(np.array([1, 3])).tolist() == [1, 3]
    assert np.isnan([none.auroc(), all_.auroc(), none.average_precision(), none.false_positive_rate(0.95)]).all()


def test_intervals_are_percentiles_over_resampled_rows(monkeypatch):
    monkeypatch.setattr(bootstrap, "RESAMPLES", 40)
    p, y = draw(200, seed=3)
    random, drawn = RANDOM(0), []
    for _ in range(40):
        rows = random.integers(0, 200, 200)
        drawn.append(m.aurc(p[rows], y[rows]))
    figure = m.classification_figures(p, y)["aurc"]
    assert [figure.low, figure.high] == pytest.approx(np.percentile(drawn, [2.5, 97.5]))


def test_the_interval_of_ece_is_reflected_and_that_of_accuracy_is_wilsons(monkeypatch):
    monkeypatch.setattr(bootstrap, "RESAMPLES", 40)
    p, y = draw(200, seed=3)
    random, drawn = RANDOM(0), []
    for _ in range(40):
        rows = random.integers(0, 200, 200)
        drawn.append(m.ece(p[rows], y[rows]))
    figures, value = m.classification_figures(p, y), m.ece(p, y)
    low, high = 2 * value - np.percentile(drawn, [97.5, 2.5])
    assert [figures["ece"].low, figures["ece"].high] == pytest.approx([max(0, low), max(value, high)])
    interval = binomtest(int((p.argmax(1) == y).sum()), 200).proportion_ci(method="wilson")
    assert [figures["accuracy"].low, figures["accuracy"].high] == pytest.approx(list(interval), abs=1e-4)


def test_where_all_is_right_accuracy_is_still_uncertain_and_a_calibrated_ece_may_be_0():
    right = m.classification_figures(np.eye(3)[np.zeros(50, int)], np.zeros(50, int))["accuracy"]
    assert (right.value, right.high) == (1, 1)
    assert right.low == pytest.approx(1 / (1 + 1.96**2 / 50))
    random = RANDOM(1)
    p = random.dirichlet(np.ones(5), 2000)
    y = (p.cumsum(1) > random.random(2000)[:, None]).argmax(1)
    assert m.classification_figures(p, y)["ece"].low < 0.005 < m.ece(p, y)


def test_ood_intervals_resample_both_sets(monkeypatch):
    monkeypatch.setattr(bootstrap, "RESAMPLES", 40)
    low, high = RANDOM(0).normal(size=90), RANDOM(1).normal(size=60) + 1
    random, drawn = RANDOM(0), []
    for _ in range(40):
        a, b = low[random.integers(0, 90, 90)], high[random.integers(0, 60, 60)]
        drawn.append([m.ood_auroc(a, b), m.ood_aupr(a, b), m.ood_fpr95(a, b)])
    for figure, of_rows in zip(m.ood_figures(low, high).values(), np.transpose(drawn), strict=True):
        assert [figure.low, figure.high] == pytest.approx(np.percentile(of_rows, [2.5, 97.5]))
