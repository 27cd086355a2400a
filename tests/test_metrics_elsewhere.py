"""Metrics on public predictions, and against torch-uncertainty, torchmetrics and netcal where those are installed."""

import warnings

import numpy as np
import pytest
import torch

from compress_uq import metrics as m
from compress_uq.metrics import order, ranking
from test_metrics import draw

# Accuracy, AUSE, AUSE exact, AURC, ECE and AUSE of the sign as printed, measured outside this project.
GOLDEN = {
    "cifar100-densenet-bc-100": (0.7541, 0.03770019877564129, 0.03765, 0.07088, 0.142153, -0.116),
    "cifar100-wideresnet-16-4": (0.7543, 0.03804, 0.03797, 0.07223, 0.058062, -0.109),
}


def others():
    """torch-uncertainty's metrics; importing it warns of what its own dependencies deprecate."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torch_uncertainty.metrics", exc_type=ImportError)


@pytest.fixture(params=["drawn", *GOLDEN])
def answers(request):
    """Probabilities and labels: drawn ones, and those of two networks."""
    if request.param == "drawn":
        p, y = draw(900, 7)
        return p.astype(np.float32), y
    data = np.load(request.getfixturevalue("real_data") / "predictions" / f"{request.param}.npz")
    return data["predictions"], data["ground_truth"]


def of(metric, p, y):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric.update(torch.from_numpy(p), torch.from_numpy(y))
        return float(metric.compute())


@pytest.mark.parametrize("name", GOLDEN)
def test_figures_of_public_predictions(real_data, name):
    data = np.load(real_data / "predictions" / f"{name}.npz")
    p, y = data["predictions"], data["ground_truth"]
    accuracy, ause, exact, aurc, ece, literal = GOLDEN[name]
    assert m.accuracy(p, y) == pytest.approx(accuracy, abs=1e-12)
    assert m.ause(p, y) == pytest.approx(ause, abs=5e-6)
    assert m.ause_exact(p, y) == pytest.approx(exact, abs=5e-6)
    assert m.aurc(p, y) == pytest.approx(aurc, abs=5e-6)
    assert m.ece(p, y) == pytest.approx(ece, abs=5e-6)
    # Algorithm 1 as printed keeps u >= percentile(u, q): the sparsification error comes out negative.
    wrong, u, oracle = p.argmax(1) != y, 1 - p.max(1), 1 - p[np.arange(len(y)), y]
    kept = [[wrong[s >= np.percentile(s, q)].mean() for q in range(0, 100, 2)] for s in (u, oracle)]
    assert np.trapezoid(np.subtract(*kept), dx=0.02) == pytest.approx(literal, abs=5e-4)
    assert m.error_auroc(p, y) > 0.8
    assert m.random_ause(p, y) > 5 * m.ause(p, y)


def test_ties_of_half_precision(real_data):
    data = np.load(real_data / "predictions" / "cifar100-densenet-bc-100.npz")
    p, y = data["predictions"].astype(np.float16), data["ground_truth"]
    assert (p.max(1) == 1).sum() == 3306
    # AURC is between those of the best and the worst order of the ties.
    assert 0.0691 < m.aurc(p, y) < 0.0930
    wrong, halves = p.argmax(1) != y, (np.float16(1) - p.max(1), np.float16(1) - p[np.arange(len(y)), y])
    ranked = [order.Ranking(u.astype(np.float64), wrong).weighed() for u in halves]
    assert ranking.sparsification_error(*ranked) == pytest.approx(0.0405, abs=6e-5)


def test_against_torch_uncertainty(answers):
    tu, (p, y) = others(), answers
    k = p.shape[1]
    assert m.nll(p, y) == pytest.approx(of(tu.CategoricalNLL(), p, y), rel=1e-5)
    assert m.brier(p, y) == pytest.approx(of(tu.BrierScore(num_classes=k), p, y), rel=1e-5)
    assert m.classwise_ece(p, y) == pytest.approx(
        of(tu.ClasswiseCalibrationError(num_classes=k, num_bins=15), p, y), abs=1e-6
    )
    for binning, adaptive in (("width", False), ("mass", True)):
        theirs = tu.CalibrationError(task="multiclass", num_classes=k, num_bins=15, adaptive=adaptive)
        assert m.ece(p, y, binning=binning) == pytest.approx(of(theirs, p, y), abs=5e-6)
    assert m.coverage_at_risk(p, y, risk=0.05) == pytest.approx(of(tu.CovAtxRisk(0.05), p, y), abs=2e-4)
    assert m.risk_at_coverage(p, y, coverage=0.8) == pytest.approx(of(tu.RiskAtxCov(0.8), p, y), abs=1e-6)
    # Theirs is the trapezoid over k / N from 1 / N to 1, ours the mean over k.
    assert m.aurc(p, y) == pytest.approx(of(tu.AURC(), p, y), rel=5e-3)


@pytest.mark.parametrize(
    ("name", "to_0_12_1", "in_0_13"),
    [("cifar100-densenet-bc-100", 0.10329, 0.15373), ("cifar100-wideresnet-16-4", 0.10407, 0.15955)],
)
def test_their_ause_is_another_quantity(real_data, name, to_0_12_1, in_0_13):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pytest.importorskip("torch_uncertainty.metrics.sparsification", exc_type=ImportError).AUSE()
    data = np.load(real_data / "predictions" / f"{name}.npz")
    p, y = data["predictions"], data["ground_truth"]
    found = of(theirs, 1 - p.max(1), (p.argmax(1) != y).astype(int))
    assert min(abs(found - to_0_12_1), abs(found - in_0_13)) < 1e-4
    assert found > 2 * m.ause(p, y)


def test_members_and_sets_against_torch_uncertainty():
    tu = others()
    p = np.stack([draw(200, 4, seed)[0] for seed in range(6)])
    y = draw(200, 4)[1]
    by_image = torch.from_numpy(p).transpose(0, 1)
    for ours, metric, given in (
        (m.mutual_information(p), tu.MutualInformation("none"), by_image),
        (m.entropy(p[0]), tu.Entropy("none"), by_image[:, 0]),
    ):
        metric.update(given)
        assert ours == pytest.approx(metric.compute().numpy(), abs=1e-6)
    sets = p[0] > 0.3
    assert m.set_coverage(sets, y) == pytest.approx(of(tu.CoverageRate(), sets, y))
    assert m.mean_set_size(sets) == pytest.approx(of(tu.SetSize(), sets, y))


@pytest.mark.parametrize("digits", [1, 12])
def test_ood_against_torch_uncertainty(digits):
    tu = others()
    random = np.random.default_rng(2)
    low, high = random.random(400).round(digits), random.beta(2, 1, 300).round(digits)
    scores, out = np.r_[low, high], np.r_[np.zeros(400, int), np.ones(300, int)]
    assert m.ood_fpr95(low, high) == pytest.approx(of(tu.FPR95(pos_label=1), scores, out))
    assert m.ood_fpr95_in(low, high) == pytest.approx(of(tu.FPR95(pos_label=0), -scores, out))


def test_against_torchmetrics(answers):
    tm, (p, y) = pytest.importorskip("torchmetrics.classification"), answers
    k = p.shape[1]
    assert m.ece(p, y) == pytest.approx(of(tm.MulticlassCalibrationError(k, n_bins=15), p, y), abs=5e-6)
    assert m.f1_macro(p, y) == pytest.approx(of(tm.MulticlassF1Score(k), p, y), rel=1e-5)
    wrong = (p.argmax(1) != y).astype(int)
    assert m.error_auroc(p, y) == pytest.approx(of(tm.BinaryAUROC(), 1 - p.max(1), wrong), abs=1e-5)


def test_against_netcal(answers):
    netcal, (p, y) = pytest.importorskip("netcal.metrics"), answers
    assert m.ece(p, y) == pytest.approx(netcal.ECE(15).measure(p, y), abs=5e-6)


def test_equal_mass_against_netcal():
    # netcal's edges are quantiles: bins as ours where no confidences tie and the bins divide the images.
    netcal, (p, y) = pytest.importorskip("netcal.metrics"), draw(1500, 5, seed=4)
    theirs = netcal.ECE(15, equal_intervals=False).measure(p, y)
    assert m.ece(p, y, binning="mass") == pytest.approx(theirs, abs=1e-3)
