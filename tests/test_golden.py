"""Figures measured outside this project on public predictions, and the closed forms of other projects' own tests."""

import math

import numpy as np
import pytest
import torch

from compress_uq import metrics as m
from compress_uq.calibration import Temperature
from compress_uq.calibration.choice import calibrated
from compress_uq.decisions import LAC, RAPS
from compress_uq.metrics import order

DENSENET, WIDE = "cifar100-densenet-bc-100", "cifar100-wideresnet-16-4"


def predictions(folder, name):
    stored = np.load(folder / "predictions" / f"{name}.npz")
    return stored["predictions"], stored["ground_truth"]


# AUSE with a last point of 0, and with the same 50 points spread over 0 to 1; with an oracle that knows only right and
# wrong, by percentiles and with every image a step; torch-uncertainty's, to 0.12.1 and in 0.13; of a random order.
@pytest.mark.parametrize(
    ("name", "last", "spread", "tied", "excess", "of_errors", "of_rate", "random"),
    [
        (DENSENET, 0.03770, 0.03847, 0.00945, 0.03780, 0.10329, 0.15373, 0.2128),
        (WIDE, 0.03809, 0.03882, 0.01087, 0.03920, 0.10407, 0.15955, 0.2127),
    ],
)
def test_other_definitions_of_ause_give_their_own_figures(
    real_data, name, last, spread, tied, excess, of_errors, of_rate, random
):
    p, y = predictions(real_data, name)
    wrong = p.argmax(1) != y
    _, curve, best = m.sparsification_curves(p, y)
    assert np.trapezoid(np.append(curve - best, 0), dx=0.02) == pytest.approx(last, abs=5.5e-6)
    assert np.trapezoid(curve - best, np.linspace(0, 1, 50)) == pytest.approx(spread, abs=5.5e-6)
    assert np.trapezoid(curve - m.sparsification_curves(p, y, wrong)[1], dx=0.02) == pytest.approx(tied, abs=5.5e-6)
    perfect = m.aurc(p, y, wrong)
    assert m.aurc(p, y) - perfect == pytest.approx(excess, abs=5.5e-6)
    assert (m.aurc(p, y) - perfect) / wrong.mean() == pytest.approx(of_rate, abs=2e-5)
    left = [
        order.Ranking(u.astype(float), wrong).weighed().positives_among(np.arange(10_000, -1, -1))
        for u in (1 - p.max(1), wrong)
    ]
    by_errors = np.trapezoid(np.subtract(*left) / wrong.sum(), dx=1 / 10_001)
    assert by_errors == pytest.approx(of_errors, abs=2e-5)
    # A random order's error rate stays what it is. `random_ause` is smaller, .2078 and .2065: it is measured as AUSE
    # is, with the oracle 1 - p[y], whose curve lies higher, and over 0 to 0.98.
    assert wrong.mean() - perfect == pytest.approx(random, abs=5e-5)
    assert m.ause(p, y) < m.random_ause(p, y) < wrong.mean() - perfect


@pytest.mark.parametrize(
    ("accuracy", "value"),
    [
        (0.7541, 0.2128), (0.7543, 0.2127), (0.9109, 0.0850), (0.1246, 0.2595), (0.6342, 0.2888), (0.1, 0.2303),
        (0.7797, 0.1940), (0.8134, 0.1680), (0.7831, 0.1915),
    ],
)  # fmt: skip
def test_a_random_order_exceeds_the_perfect_one_by_a_closed_form(accuracy, value):
    """-accuracy log accuracy: the error rate r minus the perfect order's r + (1 - r) log(1 - r)."""
    y = (np.arange(10_000) >= round(10_000 * accuracy)).astype(int)
    p = np.tile([0.6, 0.4], (10_000, 1))
    random, perfect = m.aurc(p, y), m.aurc(p, y, y)
    assert random - perfect == pytest.approx(value, abs=1e-4)
    assert random == pytest.approx(1 - accuracy)
    assert m.error_auroc(p, y, y) == 1


def test_the_perfect_order_at_the_papers_accuracy():
    y = (np.arange(10_000) >= 7797).astype(int)
    assert m.aurc(np.tile([0.6, 0.4], (10_000, 1)), y, y) == pytest.approx(0.0263, abs=5e-5)


def test_float32_leaves_few_ties(real_data):
    assert (predictions(real_data, WIDE)[0].max(1) == 1).sum() == 11
    p, y = predictions(real_data, DENSENET)
    assert (p.max(1) == 1).sum() == 660
    wrong, u = p.argmax(1) != y, 1 - p.max(1)
    for first, expected in ((wrong, 0.070876), (~wrong, 0.070891)):
        place = np.empty(len(y))
        place[np.lexsort((first, u))] = np.arange(len(y))
        assert m.aurc(p, y, place) == pytest.approx(expected, abs=6e-7)
    assert 0.070876 < m.aurc(p, y) < 0.070892


def halves(count):
    for seed in range(count):
        drawn = np.random.default_rng(seed).permutation(10_000)
        yield drawn[:5000], drawn[5000:]


def could_be_of_a_split(printed, found):
    """Whether a figure is within three deviations over splits: it was measured on one, and which is not known."""
    return abs(np.mean(found) - printed) < 3 * np.std(found, ddof=1)


# ECE, NLL and AUSE as the network answers, then with a temperature fitted on the other half; None was not printed.
@pytest.mark.parametrize(
    ("name", "printed"),
    [
        (DENSENET, (0.146, 1.230, 0.0390, 0.020, 0.881, 0.0358)),
        (WIDE, (0.057, None, None, 0.039, None, None)),
    ],
)
def test_what_a_temperature_does(real_data, name, printed):
    p, y = predictions(real_data, name)
    logits = np.log(np.maximum(p, 1e-12))[None]
    found = []
    for inside, outside in halves(10):
        after = calibrated(Temperature.fit(logits[:, inside], y[inside]), logits[:, outside])
        found.append([f(q, y[outside]) for q in (p[outside], after) for f in (m.ece, m.nll, m.ause)])
    by_figure = np.array(found).T
    for value, values in zip(printed, by_figure, strict=True):
        assert value is None or could_be_of_a_split(value, values), (value, values)
    before, after = by_figure[:3], by_figure[3:]
    assert (after[:2] < before[:2]).all(), "ECE and NLL fall on every split"
    if name == DENSENET:
        for figure in (1, 2):  # how much NLL and AUSE fall varies less than they do
            assert could_be_of_a_split(printed[figure] - printed[figure + 3], before[figure] - after[figure])


def sets_by_the_sum_that_includes_a_class(q, y, inside, outside, penalty, free):
    """Deterministic APS and RAPS as they are published: a class's score holds its own probability."""
    ranked = np.argsort(-q, 1)
    sums = np.take_along_axis(q, ranked, 1).cumsum(1) + penalty * np.maximum(0, np.arange(1, q.shape[1] + 1) - free)
    scores = np.empty_like(q)
    np.put_along_axis(scores, ranked, sums, 1)
    threshold = np.sort(scores[inside, y[inside]])[math.ceil(0.9 * (len(inside) + 1)) - 1]
    return scores[outside] <= threshold


def test_sets_at_a_coverage_of_ninety_percent(real_data):
    """Size and coverage of DenseNet's sets. RAPS here leaves a class's own share out, and names half as many."""
    p, y = predictions(real_data, DENSENET)
    logits = np.log(np.maximum(p, 1e-12))[None]
    found = {"lac": [], "aps": [], "raps": [], "ours": []}
    for inside, outside in halves(8):
        q = calibrated(Temperature.fit(logits[:, inside], y[inside]), logits)
        given = torch.from_numpy(q[outside])
        sets = {
            "lac": LAC.fit(q[inside], y[inside], coverage=0.9)(given).numpy(),
            "aps": sets_by_the_sum_that_includes_a_class(q, y, inside, outside, 0, 0),
            "raps": sets_by_the_sum_that_includes_a_class(q, y, inside, outside, 0.01, 5),
            "ours": RAPS.fit(q[inside], y[inside], coverage=0.9, options={"penalty": 0.01, "free": 5})(given).numpy(),
        }
        for name, named in sets.items():
            found[name].append((m.mean_set_size(named), m.set_coverage(named, y[outside])))
    for name, printed in (("lac", (2.05, 0.902)), ("aps", (26.7, 0.893)), ("raps", (6.5, 0.898))):
        for value, values in zip(printed, np.transpose(found[name]), strict=True):
            assert could_be_of_a_split(value, values), (name, value, values)
    size, coverage = np.mean(found["ours"], 0)
    assert size < 6.5 / 2
    assert coverage == pytest.approx(0.9, abs=0.01)


def two(probability_of_1):
    return np.stack([1 - np.array(probability_of_1), probability_of_1], 1)


FIVE, ALL_WRONG = two([0.1, 0.2, 0.3, 0.4, 0.2]), np.ones(5, int)
NINE = two([0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.48, 0.49])


def test_risk_and_coverage_in_torch_uncertaintys_cases():
    assert m.aurc(FIVE, ALL_WRONG) == pytest.approx(1)
    assert m.aurc(FIVE, 1 - ALL_WRONG) == 0
    assert np.isnan(m.coverage_at_risk(FIVE, ALL_WRONG, risk=0.5))
    assert m.coverage_at_risk(NINE, [1, 0, 1, 1, 1, 0, 0, 0, 1], risk=0.55) == pytest.approx(8 / 9)
    assert m.coverage_at_risk(FIVE, [0, 0, 1, 1, 1], risk=0.5) == pytest.approx(4 / 5)
    assert m.coverage_at_risk(FIVE, [0, 0, 1, 1, 0], risk=0.5) == 1
    assert m.risk_at_coverage(FIVE, ALL_WRONG, coverage=0.5) == 1
    assert m.risk_at_coverage(FIVE, [0, 0, 1, 1, 1], coverage=0.5) == pytest.approx(1 / 3)
    six = [0, 0, 1, 0, 1, 1]
    assert m.risk_at_coverage(two([0.1, 0.19, 0.3, 0.15, 0.4, 0.2]), six, coverage=0.5) == 0
    assert m.risk_at_coverage(two([0.1, 0.2, 0.3, 0.15, 0.4, 0.2]), six, coverage=0.55) == pytest.approx(1 / 4)


def test_fpr95_in_torch_uncertaintys_cases():
    assert m.ood_fpr95([0.99], [1.0] * 99) == 0
    assert m.ood_fpr95([0.95] * 50 + [0.85] * 50, [0.9] * 100) == 0.5
    assert m.ood_fpr95([1.0], [0.99] * 99) == 1


def test_equal_mass_ece_in_torch_uncertaintys_cases():
    wanted = 3 / 5 * (1 - (0.7 + 0.76 + 0.75) / 3) + 2 / 5 * (0.8 - 0.5)
    assert m.ece(two([0.3, 0.24, 0.25, 0.8, 0.2]), [0, 0, 0, 1, 1], bins=2, binning="mass") == pytest.approx(wanted)
    four = two([0.35, 0.35, 0.75, 0.75]), [0, 0, 1, 1]
    assert m.ece(*four, bins=2, binning="mass") == pytest.approx(m.ece(*four, bins=4)) == pytest.approx(0.3)


def test_members_in_torch_uncertaintys_cases():
    disagreeing, agreeing = [[1e-8, 1 - 1e-8], [1 - 1e-8, 1e-8]], [[0.9, 0.1], [0.9, 0.1]]
    found = m.mutual_information(np.transpose([disagreeing, agreeing], (1, 0, 2)))
    assert found == pytest.approx([math.log(2), 0], rel=1e-5, abs=1e-12)


def test_the_oracle_itself_has_no_sparsification_error():
    p, y = np.random.default_rng(0).dirichlet(np.ones(5), 500), np.arange(500) % 5
    oracle = 1 - p[np.arange(500), y]
    assert (m.ause(p, y, oracle), m.ause_exact(p, y, oracle)) == (0, 0)
