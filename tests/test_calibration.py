"""Temperature against an outside optimiser, and what cannot be calibrated."""

import numpy as np
import pytest
import torch
from netcal.scaling import TemperatureScaling

import compress_uq as cuq
from compress_uq.calibration import Identity, Temperature
from compress_uq.errors import CalibrationError, DataError, UnknownNameError


def draw(seed=0, members=1, scale=4.0):
    random = np.random.default_rng(seed)
    logits = random.normal(size=(members, 800, 6)) * 2
    p = np.exp(logits).mean(0)
    labels = np.array([random.choice(6, p=row / row.sum()) for row in p])
    return logits * scale, labels


def nll(logits, labels, temperature):
    p = torch.softmax(torch.from_numpy(logits) / temperature, 2).mean(0)
    return -p[torch.arange(len(labels)), torch.from_numpy(labels)].log().mean().item()


@pytest.mark.parametrize("seed", range(3))
def test_one_member_equals_netcal(seed):
    logits, labels = draw(seed)
    ours = Temperature.fit(logits, labels).temperature
    outside = TemperatureScaling()
    outside.fit(torch.softmax(torch.from_numpy(logits[0]), 1).numpy(), labels)
    assert ours == pytest.approx(1 / float(np.squeeze(outside.temperature)), rel=0.01)


def test_members_minimise_the_nll_of_their_mean():
    logits, labels = draw(members=5)
    best = Temperature.fit(logits, labels).temperature
    grid = np.linspace(0.5, 20, 400)
    values = [nll(logits, labels, t) for t in grid]
    assert nll(logits, labels, best) <= min(values) + 1e-9
    assert best == pytest.approx(grid[int(np.argmin(values))], abs=0.1)


def test_the_temperature_acts_on_the_logits():
    fitted = Temperature(log_temperature=torch.tensor(2.0).log())
    assert torch.allclose(fitted.logits(torch.tensor([[[2.0, 4.0]]])), torch.tensor([[[1.0, 2.0]]]))
    assert torch.equal(Identity.fit(np.zeros((1, 1, 2)), np.zeros(1)).logits(torch.ones(1, 1, 2)), torch.ones(1, 1, 2))


def test_a_separable_split_has_no_temperature():
    logits = np.eye(3)[None].repeat(4, 1) * 5
    with pytest.raises(CalibrationError, match="12 of 12"):
        Temperature.fit(logits, np.tile(np.arange(3), 4)[np.argsort(np.tile(np.arange(3), 4), kind="stable")])


def test_an_unfitted_calibrator_does_not_pass_for_one():
    with pytest.raises(CalibrationError, match="before it was fitted"):
        Temperature().logits(torch.ones(1, 1, 2))


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
