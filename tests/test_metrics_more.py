"""Metrics beyond the card's: small cases by hand, and what is refused."""

import numpy as np
import pytest
import torch

from compress_uq import metrics as m
from compress_uq.errors import DataError, InputError, UnknownNameError

# Confidences .9 .8 .7 .6 .5; the fourth and fifth are wrong.
P = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.6, 0.4], [0.5, 0.5]])
Y = np.array([0, 1, 0, 1, 1])
# Four images: classes 0 0 1 2 predicted 0 1 1 2, most certain first.
P3 = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.2, 0.6, 0.2], [0.25, 0.25, 0.5]])
Y3 = np.array([0, 0, 1, 2])


def test_risk_and_coverage_by_hand():
    # Error rates of the first 1 to 5: 0, 0, 0, 1/4, 2/5.
    assert [m.risk_at_coverage(P, Y, coverage=c) for c in (0.2, 0.6, 0.61, 0.8, 1)] == [0, 0, 1 / 4, 1 / 4, 2 / 5]
    assert [m.coverage_at_risk(P, Y, risk=r) for r in (0, 0.2, 0.25, 0.3, 0.4, 1)] == [0.6, 0.6, 0.8, 0.8, 1, 1]
    assert np.isnan(m.coverage_at_risk(P, 1 - Y, P[:, 0] * 0, risk=0.1))  # all tied: 3/5 wrong at every coverage


def test_aurc_published_closed_form():
    # torch-uncertainty integrates the same risks by trapezoids from 1/N to 1.
    p1, y = np.array([0.1, 0.2, 0.3, 0.4, 0.2]), np.array([0, 0, 1, 1, 0])
    p = np.stack([1 - p1, p1], 1)
    risks = [m.risk_at_coverage(p, y, coverage=k / 5) for k in range(1, 6)]
    assert m.aurc(p, y) == pytest.approx(np.mean(risks))
    closed = (0.25 * 0.2 / 2 + 0.25 * 0.2 + 0.15 * 0.2 / 2) / 0.8
    assert np.trapezoid(risks, dx=0.2) / 0.8 == pytest.approx(closed)


def test_f1_by_hand():
    assert m.f1_per_class(P3, Y3).tolist() == pytest.approx([2 / 3, 2 / 3, 1])
    # The more certain half, 0 -> 0 and 0 -> 1: class 2 is not there.
    half = m.f1_per_class(P3, Y3, retained=0.5)
    assert half.tolist()[:2] == pytest.approx([2 / 3, 0])
    assert np.isnan(half[2])
    assert m.f1_at(P3, Y3) == pytest.approx(1 / 3)
    assert m.f1_at(P3, Y3, retained=1) == m.f1_macro(P3, Y3)


def test_f1_of_ties_counts_each_by_its_share():
    # Nobody is certain: a half of each of the four, so all counts halve and F1 is that of all.
    assert m.f1_at(P3, Y3, np.zeros(4)) == pytest.approx(m.f1_macro(P3, Y3))
    # One certain image and one of three that tie.
    third = m.f1_per_class(P3, Y3, [0, 1, 1, 1], retained=0.5)
    assert third.tolist() == pytest.approx([2 / (2 + 1 / 3), 2 / 3 / (2 / 3 + 1 / 3), 1])


def test_equal_mass_ece_by_hand():
    # Sorted .5 .6 .7 .8 .9, right 0 0 1 1 1, in two bins of three and two.
    assert m.ece(P, Y, bins=2, binning="mass") == pytest.approx((abs(1 - 1.8) + abs(2 - 1.7)) / 5)
    assert m.ece(P, Y, bins=5, binning="mass") == pytest.approx((0.5 + 0.6 + 0.3 + 0.2 + 0.1) / 5)
    assert m.ece(P, Y, bins=50, binning="mass") == m.ece(P, Y, bins=5, binning="mass")


def test_equal_mass_bins_do_not_depend_on_the_order_of_ties():
    p, y = np.repeat([[0.75, 0.25]], 4, 0), np.array([0, 0, 1, 1])
    for labels in (y, y[::-1], y[[0, 2, 1, 3]]):
        assert m.ece(p, labels, bins=2, binning="mass") == pytest.approx(0.25)
    assert m.reliability(p, y, bins=2, binning="mass").count.tolist() == [2, 2]


def test_width_and_edges_by_hand():
    p = np.array([[0.5, 0.3, 0.2], [0.45, 0.3, 0.25]])
    assert m.ece(p, np.array([0, 1]), bins=10) == pytest.approx(0.475)


def test_classwise_ece_by_hand():
    # Two bins. Class 0 holds .9 .7 .6 .5 | .2, two of them class 0; class 1 holds .8 .5 | .1 .3 .4.
    class_0 = (abs(2 - 2.7) + 0.2) / 5
    class_1 = (abs(2 - 1.3) + abs(1 - 0.8)) / 5
    assert m.classwise_ece(P, Y, bins=2) == pytest.approx((class_0 + class_1) / 2)
    assert m.classwise_ece(np.eye(3), np.arange(3)) == 0


def test_entropies_by_hand():
    p = np.array([[0.5, 0.5, 0], [1, 0, 0], [1 / 3, 1 / 3, 1 / 3]])
    assert m.entropy(p).tolist() == pytest.approx([np.log(2), 0, np.log(3)])
    assert np.copysign(1, m.entropy(p))[1] == 1
    members = np.array([[[1, 0], [0.5, 0.5], [0.7, 0.3]], [[0, 1], [0.5, 0.5], [0.7, 0.3]]])
    assert m.mutual_information(members).tolist() == pytest.approx([np.log(2), 0, 0])
    assert m.mutual_information(members).min() >= 0
    assert m.mutual_information(members[:1]).tolist() == [0, 0, 0]


def test_vote_entropy_by_hand():
    votes = torch.tensor([[0, 0, 0], [0, 1, 1], [0, 1, 2], [0, 1, 2]])  # (members, images)
    logits = 5.0 * torch.nn.functional.one_hot(votes, 3)
    expected = [0, -(0.25 * np.log(0.25) + 0.75 * np.log(0.75)), 1.5 * np.log(2)]
    assert m.vote_entropy(logits).tolist() == pytest.approx(expected)
    assert m.vote_entropy(torch.softmax(logits, 2)).tolist() == pytest.approx(expected)


def test_sets_by_hand():
    sets = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1]], bool)
    assert m.set_coverage(sets, [0, 2, 1, 2]) == 0.5
    assert m.mean_set_size(torch.from_numpy(sets)) == 1.5


def test_ood_conventions_by_hand():
    low, high = np.arange(20.0), np.array([3.5, 18.5, 30, 40])
    # 95 % of 20 in-distribution scores are at or below 18: one OOD score of four is let in.
    assert m.ood_fpr95_in(low, high) == 0.25
    # All of four OOD scores must be flagged, from 3.5 on: 16 of 20.
    assert m.ood_fpr95(low, high) == 0.8
    assert m.ood_auroc(low, high) == m.ood_auroc(-high, -low) == pytest.approx((4 + 19 + 20 + 20) / 80)
    # Descending: OOD OOD in OOD in*15 OOD.
    assert m.ood_aupr(low, high) == pytest.approx((1 + 1 + 3 / 4 + 4 / 20) / 4)
    perfect = [f([0.0, 1], [2.0, 3]) for f in (m.ood_auroc, m.ood_aupr, m.ood_aupr_in, m.ood_fpr95, m.ood_fpr95_in)]
    assert perfect == [1, 1, 1, 0, 0]
    assert m.ood_aupr([0.0] * 9, [0.0]) == 0.1
    assert m.ood_aupr_in([0.0] * 9, [0.0]) == pytest.approx(0.9)


@pytest.mark.parametrize("change", [lambda s: s + 30, lambda s: 60 * s, np.exp, lambda s: s.astype(np.float32)])
def test_ood_figures_do_not_change_under_a_monotone_map(change):
    random = np.random.default_rng(0)
    low, high = random.normal(size=200).astype(np.float32), random.normal(size=300).astype(np.float32) + 1
    for f in (m.ood_auroc, m.ood_aupr, m.ood_aupr_in, m.ood_fpr95, m.ood_fpr95_in):
        assert f(change(low.astype(float)), change(high.astype(float))) == f(low, high)


def test_spearman():
    assert m.spearman([1, 2, 3, 4], [1, 4, 9, 16]) == pytest.approx(1)
    assert m.spearman([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(1 - 6 * 4 / (4 * 15))
    assert np.isnan(m.spearman([1, 2], [5, 5]))


def test_papers_variance_and_mean_are_of_logits():
    logits = torch.tensor([[[4.0, 0, 0], [1, 2, 0]], [[0.0, 1, 0], [1, 4, 0]]])
    # Means: (2, .5, 0) predicts 0, whose logits are 4 and 0; (1, 3, 0) predicts 1: 2 and 4.
    assert m.paper.logit_variance(logits).tolist() == [4, 1]
    mean = torch.tensor([[2, 0.5, 0], [1, 3, 0]], dtype=torch.float64)
    assert m.paper.mean_logit_softmax(logits) == pytest.approx(torch.softmax(mean, 1).numpy())
    shifted = m.paper.mean_logit_softmax(logits + 1e4)
    assert shifted == pytest.approx(torch.softmax(mean, 1).numpy(), rel=1e-3)


def test_min_max_ece_by_hand():
    # Scaled variances 0 .25 .5 .75 1: confidences 1 .75 .5 .25 0, each in its own of ten bins.
    expected = (0 + 0.25 + 0.5 + 0.25 + 0) / 5
    assert m.paper.min_max_ece(P, Y, [1, 1.5, 2, 2.5, 3], bins=10) == pytest.approx(expected)
    p, y = np.tile([[0.6, 0.4]], (1000, 1)), (np.arange(1000) >= 800).astype(int)
    variance = np.r_[np.random.default_rng(0).random(999), 1e6]
    assert m.paper.min_max_ece(p, y, variance) == pytest.approx(1 - m.accuracy(p, y), abs=2e-3)


def test_pooled_ece_counts_ood_as_wrong():
    inside, outside = np.array([[1.0, 0], [0, 1.0]]), np.array([[0.9, 0.1], [0.25, 0.75]])
    # Bin of 1.0: right twice; .9 lies in the same tenth, wrong; .75 alone, wrong.
    assert m.paper.pooled_ece(inside, [0, 1], outside, bins=10) == pytest.approx((abs(2 - 2.9) + 0.75) / 4)
    low, high = [0.1, 0.2], [0.15, 0.3]
    assert m.paper.tradi_fpr95(low, high) == m.ood_fpr95_in(low, high) == 0.5
    assert m.paper.tradi_aupr(low, high) == m.ood_aupr_in(low, high)


@pytest.mark.parametrize(
    "kind",
    [np.float32, np.float64, list, torch.from_numpy, lambda a: torch.from_numpy(a).requires_grad_(a.dtype == float)],
)
def test_arrays_lists_and_tensors_agree(kind):
    assert m.ause(kind(P), Y) == pytest.approx(m.ause(P, Y))
    assert m.nll(kind(P), torch.from_numpy(Y)) == pytest.approx(m.nll(P, Y))
    assert m.classwise_ece(kind(P), list(Y)) == pytest.approx(m.classwise_ece(P, Y))


def test_half_precision_is_read_as_it_is():
    p = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    assert m.brier(p.bfloat16(), [0, 0]) == m.brier(p, [0, 0]) == (0.5 + 2 * 0.75**2) / 2
    assert m.accuracy(P.astype(np.float16), Y) == m.accuracy(P, Y)


def test_rows_are_counted_across_blocks(monkeypatch):
    monkeypatch.setattr(m.arrays, "_BLOCK", 4)
    assert m.brier(P, Y) == pytest.approx(((P - np.eye(2)[Y]) ** 2).sum(1).mean())
    broken = P.copy()
    broken[4] = np.nan
    with pytest.raises(DataError, match="row 4"):
        m.brier(broken, Y)


def bad(row, column, value):
    p = P.copy()
    p[row, column] = value
    return p


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: m.ece(bad(2, 0, np.nan), Y), "NaN or infinite values, first in row 2"),
        (lambda: m.nll(bad(1, 1, np.inf), Y), "NaN or infinite values, first in row 1"),
        (lambda: m.ause(bad(3, 0, -np.inf), Y), "NaN or infinite values, first in row 3"),
        (lambda: m.brier(bad(3, 0, 0.61), Y), "row 3 sums to 1.01"),
        (lambda: m.accuracy(np.array([[3.0, -2.0]]), [0]), "row 0 holds -2"),
        (lambda: m.accuracy(np.log(P), Y), "softmax"),
        (lambda: m.f1_macro(P, Y + 1), "labels from 1 to 2: expected 0 to 1"),
        (lambda: m.f1_at(P, Y - 1), "labels from -1 to 0: expected 0 to 1"),
        (lambda: m.accuracy(P, Y + 0.5), "float64: expected class numbers"),
        (lambda: m.accuracy(P, np.eye(2)[Y].astype(int)), r"labels \(10,\): expected"),
        (lambda: m.accuracy(P[:0], Y[:0]), "probabilities is empty"),
        (lambda: m.accuracy(P[:, 0], Y), r"expected \(N, K\)"),
        (lambda: m.aurc(P, Y, [0, 1, 2, np.nan, 4]), "uncertainty holds NaN or infinite values, first at place 3"),
        (lambda: m.aurc(P, Y, [0, 1, 2]), "3 values: expected one for each of 5"),
        (lambda: m.ood_auroc([1.0], []), "out_scores is empty"),
        (lambda: m.ood_fpr95_in([], [1.0]), "in_scores is empty"),
        (lambda: m.ood_figures([1.0, np.inf], [1.0]), "in_scores holds NaN or infinite"),
        (lambda: m.entropy(P[None]), r"expected \(N, K\)"),
        (lambda: m.mutual_information(P), r"expected \(M, N, K\)"),
        (lambda: m.mutual_information(2 * P[None]), "sums to 2"),
        (lambda: m.vote_entropy(np.full((2, 2, 2), np.nan)), "NaN"),
        (lambda: m.set_coverage(P, Y), "expected booleans"),
        (lambda: m.set_coverage(P > 0.5, Y[:3]), r"labels \(3,\)"),
        (lambda: m.set_coverage(P > 0.5, Y + 1), "expected 0 to 1"),
        (lambda: m.mean_set_size(np.zeros((0, 3), bool)), "none of them empty"),
        (lambda: m.paper.min_max_ece(P, Y, np.ones(5)), "1 for every image"),
        (lambda: m.paper.pooled_ece(P, Y, P3), "2 classes in-distribution and 3 out"),
        (lambda: m.paper.logit_variance(P), r"expected \(M, N, K\)"),
        (lambda: m.paper.mean_logit_softmax(np.full((1, 1, 2), np.inf)), "infinite"),
        (lambda: m.spearman([1.0], [1.0]), "two or more"),
    ],
)
def test_bad_data_are_refused(call, message):
    with pytest.raises(DataError, match=message):
        call()


def test_bad_options_are_refused():
    with pytest.raises(UnknownNameError, match="binning 'masses': did you mean 'mass'"):
        m.ece(P, Y, binning="masses")
    with pytest.raises(InputError, match="risk=2"):
        m.coverage_at_risk(P, Y, risk=2)
    with pytest.raises(InputError, match="coverage=0"):
        m.risk_at_coverage(P, Y, coverage=0)
    with pytest.raises(InputError, match="retained=0"):
        m.f1_at(P, Y, retained=0)


def test_rounded_probabilities_are_accepted():
    p = np.round(np.tile(1 / 3, (4, 3)), 3)  # sums to .999
    assert m.accuracy(p, [0, 0, 0, 1]) == 0.75
