"""Each calibrator against netcal, scikit-learn, finite differences and what is known of the data, and what is refused."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.optimize import check_grad
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

import compress_uq as cuq
from compress_uq.calibration import CALIBRATORS, Beta, Dirichlet, Histogram, Identity, Isotonic, Temperature, Vector
from compress_uq.calibration import dirichlet as dirichlet_module
from compress_uq.calibration import vector as vector_module
from compress_uq.calibration.choice import calibrated
from compress_uq.calibration.one_vs_rest import platt_targets
from compress_uq.errors import CalibrationError, DataError, MissingDependencyError, UnknownNameError
from compress_uq.fitted import fitted_record, restore_fitted
from compress_uq.metrics import ece

FITTED = [entry.name for entry in CALIBRATORS if entry.name != "none"]


def fittable(name):
    """The calibrator; the test is skipped where the library that fits it is not installed."""
    try:
        cuq.calibration.check_name(name)
    except MissingDependencyError as error:
        pytest.skip(str(error))
    return CALIBRATORS[name]


def draw(seed=0, members=1, scale=4.0, count=800, classes=6):
    """Logits (T, N, K) that are overconfident by `scale`, and labels drawn from what they should have said."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(members, count, classes)) * 2
    labels = labels_of(softmax(logits, 2).mean(0), random)
    return logits * scale, labels


def labels_of(probabilities, random):
    return (probabilities.cumsum(1) < random.random((len(probabilities), 1))).sum(1).clip(0, probabilities.shape[1] - 1)


def nll(p, labels):
    return -np.log(np.maximum(p[np.arange(len(labels)), labels], 1e-12)).mean()


def nll_at(logits, labels, temperature):
    return nll(softmax(logits / temperature, 2).mean(0), labels)


@pytest.mark.parametrize("seed", range(3))
def test_one_member_equals_netcal(seed):
    scaling = pytest.importorskip("netcal.scaling")
    logits, labels = draw(seed)
    ours = Temperature.fit(logits, labels).temperature
    outside = scaling.TemperatureScaling()
    outside.fit(softmax(logits[0], 1), labels)
    assert ours == pytest.approx(1 / float(np.squeeze(outside.temperature)), rel=0.01)


def test_members_minimise_the_nll_of_their_mean():
    logits, labels = draw(members=5)
    best = Temperature.fit(logits, labels).temperature
    grid = np.linspace(0.5, 20, 400)
    values = [nll_at(logits, labels, t) for t in grid]
    assert nll_at(logits, labels, best) <= min(values) + 1e-9
    assert best == pytest.approx(grid[int(np.argmin(values))], abs=0.1)


def test_what_acts_on_the_logits_by_hand():
    x = torch.tensor([[[2.0, 4.0]]])
    assert torch.allclose(Temperature(log_temperature=torch.tensor(2.0).log()).logits(x), torch.tensor([[[1.0, 2.0]]]))
    vector = Vector(log_scale=torch.tensor([0.0, 0.5]), bias=torch.tensor([1.0, -1.0]))
    assert torch.allclose(vector.logits(x), torch.tensor([[[3.0, 4 * float(np.exp(0.5)) - 1]]]))
    assert torch.equal(Identity.fit(np.zeros((1, 1, 2)), np.zeros(1)).logits(x), x)


def test_a_separable_split_has_no_temperature():
    logits = np.eye(3)[None].repeat(4, 1) * 5
    with pytest.raises(CalibrationError, match="12 of 12.*more calibration images"):
        Temperature.fit(logits, np.repeat(np.arange(3), 4))
    with pytest.raises(CalibrationError, match="0 of 12.*order of its classes"):
        Temperature.fit(logits, (np.repeat(np.arange(3), 4) + 1) % 3)


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e4])
def test_a_temperature_is_found_whatever_the_scale_of_the_logits(factor):
    logits, labels = draw(members=2)
    assert Temperature.fit(logits * factor, labels).temperature == pytest.approx(
        factor * Temperature.fit(logits, labels).temperature, rel=1e-3
    )


@pytest.mark.parametrize("members", [1, 3])
def test_the_gradient_of_vector_is_that_of_its_likelihood(members, monkeypatch):
    monkeypatch.setattr(vector_module, "_CHUNK", 300)  # several chunks
    logits, labels = draw(members=members, count=60)
    at = np.random.default_rng(1).normal(size=12) * 0.3

    def both(x):
        return vector_module._nll(logits, labels, -0.7, x)

    assert check_grad(lambda x: both(x)[0], lambda x: both(x)[1], at) < 1e-5
    scaled = logits * np.exp(-0.7 + at[:6]) + at[6:]
    assert both(at)[0] == pytest.approx(nll(softmax(scaled, 2).mean(0), labels))


def test_the_gradient_of_dirichlet_is_that_of_its_likelihood():
    logits, labels = draw(count=60, classes=3)
    log_p = np.log(softmax(logits[0], 1).clip(1e-12))
    at = np.random.default_rng(1).normal(size=12)

    def both(x):
        value, slope = dirichlet_module._nll(log_p, labels, x.reshape(4, 3))
        return value, slope.ravel()

    assert check_grad(lambda x: both(x)[0], lambda x: both(x)[1], at) < 1e-4


def test_vector_without_a_prior_equals_netcal():
    """netcal scales log probabilities."""
    scaling = pytest.importorskip("netcal.scaling")
    logits, labels = draw(scale=1.5, count=3000, classes=4)
    log_p = np.log(softmax(logits, 2))
    ours = vector_module._fitted(log_p, labels, 0.0, 0.0, None)
    outside = scaling.LogisticCalibration().fit(softmax(logits[0], 1), labels, tensorboard=False)
    theirs = nll(outside.transform(softmax(logits[0], 1)), labels)
    assert vector_module._nll(log_p, labels, 0.0, ours)[0] == pytest.approx(theirs, abs=1e-5)


def test_dirichlet_without_odir_equals_multinomial_regression():
    logits, labels = draw(scale=1.5, count=4000, classes=3)
    log_p = np.log(softmax(logits[0], 1))
    found = dirichlet_module._fitted(log_p, labels, 0.0, np.vstack([np.eye(3), np.zeros(3)]))
    outside = LogisticRegression(C=np.inf, max_iter=1000).fit(log_p, labels)
    q = Dirichlet(weight=torch.tensor(found[:-1]), bias=torch.tensor(found[-1])).probabilities(
        torch.tensor(log_p).exp()
    )
    assert np.abs(q.numpy() - outside.predict_proba(log_p)).max() < 0.005


def test_odir_gives_way_to_many_images():
    """Where the truth is a Dirichlet map, the fit comes near to its likelihood."""
    random, classes = np.random.default_rng(0), 4
    log_p = np.log(random.dirichlet(np.full(classes, 0.6), 24_000))
    weight = np.eye(classes) + random.normal(size=(classes, classes)) * 0.3
    truth = softmax(log_p @ weight.T, 1)
    labels = (truth.cumsum(1) > random.random(len(truth))[:, None]).argmax(1)
    fitted = Dirichlet.fit(log_p[None, :4000], labels[:4000])
    q = fitted.probabilities(torch.from_numpy(np.exp(log_p[4000:])).float()).numpy()
    assert nll(q, labels[4000:]) - nll(truth[4000:], labels[4000:]) < 0.002


def one_vs_rest(kind, p, labels, p_test, targets=lambda hits: hits.astype(int)):
    """netcal's transform of each class, normalised."""
    columns = [kind().fit(p[:, k], targets(labels == k)).transform(p_test[:, k]) for k in range(p.shape[1])]
    values = np.stack(columns, 1)
    return values / values.sum(1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 6])
def test_one_vs_rest_equals_netcal(classes):
    binning, scaling = pytest.importorskip("netcal.binning"), pytest.importorskip("netcal.scaling")
    logits, labels = draw(members=3, classes=classes, count=3000)
    fresh, _ = draw(seed=1, members=3, classes=classes, count=2000)
    mean, mean_fresh = (softmax(z, 2).mean(0).clip(1e-12, 1 - 1e-12) for z in (logits, fresh))
    # What a graph sees is float32, and 1 - p of a p near 1 is nothing there.
    single, single_fresh = (p.astype(np.float32).astype(np.float64) for p in (mean, mean_fresh))
    wanted = {
        Histogram: one_vs_rest(lambda: binning.HistogramBinning(15), mean, labels, single_fresh),
        Isotonic: one_vs_rest(binning.IsotonicRegression, single, labels, single_fresh),
        Beta: one_vs_rest(scaling.BetaCalibration, mean, labels, mean_fresh, platt_targets),
    }
    for kind, theirs in wanted.items():
        ours = kind.fit(logits, labels).probabilities(torch.tensor(mean_fresh, dtype=torch.float32)).numpy()
        assert np.isfinite(theirs).all()
        assert np.abs(ours - theirs).max() < 1e-6, kind
    if classes > 2:
        own = binning.HistogramBinning(15).fit(mean, labels).transform(single_fresh)
        assert np.abs(own - wanted[Histogram]).max() < 1e-12


def test_a_row_without_any_value_stays_as_it_was():
    values = torch.zeros(3, 15)
    values[:, 10] = 0.3
    fitted = Histogram(edges=torch.linspace(0, 1, 16), values_of_bins=values)
    mean = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25]])
    assert torch.allclose(fitted.probabilities(mean), torch.tensor([[1.0, 0, 0], [0.4, 0.35, 0.25]]))


def test_platt_targets_by_hand_and_a_class_that_is_told_apart():
    assert platt_targets(np.array([True, True, False])) == pytest.approx([3 / 4, 3 / 4, 1 / 3])
    logits, labels = np.eye(3)[None].repeat(20, 1) * 5, np.repeat(np.arange(3), 20)
    fitted = fittable("beta").fit(logits, labels)
    assert all(torch.isfinite(t).all() for t in fitted.state_dict().values())
    assert 0.7 < calibrated(fitted, logits).max() < 0.999


@pytest.mark.parametrize("name", FITTED)
def test_what_is_calibrated_stays_as_it_is(name):
    logits, labels = draw(scale=1.0, count=30_000, classes=4)
    p = softmax(logits[0], 1)
    q = calibrated(fittable(name).fit(logits, labels), logits)
    assert np.abs(q.sum(1) - 1).max() < 1e-5
    assert np.abs(p - q).mean() < (0.02 if name == "histogram" else 0.012)


@pytest.mark.parametrize("name", FITTED)
def test_a_known_distortion_is_undone(name):
    """Three times too confident: what is fitted on one half brings the other back to the truth."""
    logits, labels = draw(scale=3.0, count=40_000, classes=4)
    half = slice(20_000), slice(20_000, None)
    fitted = fittable(name).fit(logits[:, half[0]], labels[half[0]])
    truth, y = softmax(logits[0, half[1]] / 3, 1), labels[half[1]]
    assert ece(softmax(logits[0, half[1]], 1), y) > 0.1
    q = calibrated(fitted, logits[:, half[1]])
    assert ece(q, y) < 0.02
    # Curves of one class against the rest cannot undo a temperature of several classes.
    limit = {"temperature": 1e-3, "vector": 1e-3, "dirichlet": 2e-3}.get(name, 0.1)
    assert nll(q, y) - nll(truth, y) < limit


def test_biased_classes_are_put_right():
    random = np.random.default_rng(0)
    right = random.normal(size=(1, 20_000, 5)) * 2
    labels = labels_of(softmax(right[0], 1), random)
    scale, bias = np.array([1, 1.5, 0.7, 1, 1.2]), np.array([0, 1.0, -1, 0.5, 0])
    wrong = (right - bias) / scale
    fitted = Vector.fit(wrong, labels)
    assert np.abs(fitted.log_scale.exp().numpy() / scale - 1).max() < 0.06
    shift = fitted.bias.numpy() - bias
    assert np.abs(shift - shift.mean()).max() < 0.08
    assert (
        nll(calibrated(Temperature.fit(wrong, labels), wrong), labels) > nll(calibrated(fitted, wrong), labels) + 0.05
    )


@pytest.mark.parametrize("name", ["vector", "dirichlet"])
def test_small_splits_are_not_overfitted(name):
    logits, labels = draw(scale=2.0, count=10_150, classes=10)
    small, rest = slice(150), slice(150, None)
    q = calibrated(CALIBRATORS[name].fit(logits[:, small], labels[small]), logits[:, rest])
    by_temperature = calibrated(Temperature.fit(logits[:, small], labels[small]), logits[:, rest])
    assert nll(q, labels[rest]) < nll(by_temperature, labels[rest]) + 0.05


def test_public_predictions_give_the_published_temperatures(real_data):
    """Networks of netcal's examples, on all images; netcal gives 1 / T, .4715 of DenseNet's."""
    for name, temperature in (("cifar100-densenet-bc-100", 2.1207), ("cifar100-wideresnet-16-4", 1.12)):
        stored = np.load(real_data / "predictions" / f"{name}.npz")
        p, y = stored["predictions"], stored["ground_truth"]
        logits = np.log(np.maximum(p, 1e-12))[None]
        assert Temperature.fit(logits, y).temperature == pytest.approx(temperature, abs=0.01)


@pytest.mark.parametrize("name", CALIBRATORS.names)
def test_every_calibrator_is_restored_and_refuses_to_work_unfitted(name):
    kind = fittable(name)
    logits, labels = draw(members=2, count=400)
    fitted = kind.fit(logits, labels)
    again = restore_fitted(CALIBRATORS, fitted_record(fitted), fitted.state_dict(), "")
    assert np.array_equal(calibrated(fitted, logits), calibrated(again, logits))
    assert {t.dtype for t in fitted.state_dict().values()} <= {torch.float32}
    if name != "none":
        with pytest.raises(CalibrationError, match="before it was fitted"):
            calibrated(kind(), logits)


@pytest.fixture(scope="module")
def sampled():
    """A small network with dropout, too sure of itself, and images whose labels are drawn."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(600, 3, 4, 4, generator=generator)
    net = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(48, 32), torch.nn.ReLU(), torch.nn.Dropout(0.3), torch.nn.Linear(32, 6)
    )
    with torch.no_grad():
        net[4].weight.mul_(8)
        labels = torch.multinomial(torch.softmax(net.eval()(images) / 2, 1), 1, generator=generator).flatten()
    method = cuq.uq.MCDropout(samples=5, sampling_budget=9)
    prepared = cuq.prepare_uncertainty(net, method, images[:1])
    model = cuq.fit_uncertainty(prepared, method=method)
    return model, cuq.Splits(calibration=torch.utils.data.TensorDataset(images, labels))


@pytest.mark.parametrize("name", CALIBRATORS.names)
def test_every_calibrator_exports_through_the_gates(name, sampled, tmp_path):
    fittable(name)
    model, splits = sampled
    uncertain = cuq.calibrate(model, splits, method=name)
    result = cuq.export_onnx(uncertain, tmp_path / "m.onnx")
    assert result.gates["parity"].startswith("largest")
    images = splits.calibration.tensors[0]
    with torch.no_grad():
        ours, before = uncertain(images), model(images)
    theirs = cuq.OnnxPredictor(result.path)(images.numpy())
    assert np.abs(ours.probabilities.numpy() - theirs.probabilities).max() < 1e-5
    assert np.abs(theirs.probabilities.sum(1) - 1).max() < 1e-5
    assert cuq.OnnxPredictor(result.path).metadata["calibration"] == name
    if name not in ("none", "temperature", "vector"):
        assert torch.equal(ours.mutual_information, before.mutual_information)
        assert not torch.equal(ours.probabilities, before.probabilities)


def test_calibrate_needs_its_split_and_a_known_method(dense, splits):
    with pytest.warns(UserWarning):
        uncertain = cuq.fit_uncertainty(
            dense.model, method=cuq.uq.MCDropout(sampling_budget=99), example_inputs=splits.example()
        )
    with pytest.raises(DataError, match="'calibration'"):
        cuq.calibrate(uncertain, cuq.Splits(test=splits.test))
    with pytest.raises(UnknownNameError, match="temperature"):
        cuq.calibrate(uncertain, splits, method="temprature")
    calibrated = cuq.calibrate(uncertain, splits)
    assert uncertain.calibrator.name == "none"
    before = cuq.evaluate(uncertain, cuq.Splits(test=splits.calibration, info=splits.info)).metrics["nll"].value
    after = cuq.evaluate(calibrated, cuq.Splits(test=splits.calibration, info=splits.info)).metrics["nll"].value
    assert after < before


@pytest.mark.parametrize("name", FITTED)
def test_what_cannot_be_fitted_is_refused_in_a_line(name):
    kind = fittable(name)
    logits, labels = draw(count=60, classes=5)
    broken = logits.copy()
    broken[0, 3, 1], broken[0, 7, 0] = np.nan, np.inf
    few = logits[:, :4], labels[:4]
    for given, said in (
        ((broken, labels), "2 of 60 calibration images are NaN or infinite"),
        (few, "4 calibration images for 5 classes"),
        ((logits[:, :0], labels[:0]), "no images"),
        ((logits, labels[1:]), r"logits \(1, 60, 5\) and labels \(59,\)"),
        ((logits, labels + 5), "expected 0 to 4"),
    ):
        with pytest.raises(CalibrationError, match=said) as caught:
            kind.fit(*given)
        assert "\n" not in str(caught.value)
    without = labels != 2
    if kind.every_class:
        with pytest.raises(CalibrationError, match="none of class 2"):
            kind.fit(logits[:, without], labels[without])
    else:
        kind.fit(logits[:, without], labels[without])


def test_a_matrix_that_would_take_hours_is_refused(monkeypatch):
    monkeypatch.setattr(dirichlet_module, "_LARGEST", 1000)
    with pytest.raises(CalibrationError, match="36 parameters and 800 images"):
        Dirichlet.fit(*draw())


def test_netcal_comes_in_when_something_is_fitted_and_its_absence_is_told_before_any_work(monkeypatch):
    code = "import sys, compress_uq.calibration, compress_uq.pipeline; print('netcal' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("histogram", "isotonic", "beta"):
        with pytest.raises(MissingDependencyError, match=r"compress-uq\[netcal\]"):
            cuq.calibration.check_name(name)
    cuq.calibration.check_name("dirichlet")
    choice = cuq.calibration.choose(*draw(count=200))
    assert "netcal" in choice.skipped["beta"]
    assert choice.name == "temperature"
