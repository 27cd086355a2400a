"""Studies of kind `train`: networks trained with a method, unpruned."""

import json

import numpy as np
import pytest

import compress_uq as cuq
from compress_uq.metrics import ece
from compress_uq.study.resplits import resplit_ece

STUDY = """
[study]
kind = "train"

[defaults]
arch = "compress-uq:mlp"
arch-option = {widths = [16], batch_norm = true, dropout = 0.2}
data = "digits"
epochs = 2
lr = 0.01
optimizer = "adam"
sampling-budget = 100.0
samples = 3

[[grid]]
uq = UQ
seed = [0]
"""


def run(tmp_path, methods, extra=""):
    path = tmp_path / "s.toml"
    path.write_text(STUDY.replace("UQ", json.dumps(methods)) + extra)
    result = cuq.run_study(cuq.read_study(path), tmp_path / "out")
    files = (tmp_path / "out" / "runs").glob("*.json")
    return result, {(r := json.loads(f.read_text()))["settings"]["uq"]: r["result"] for f in files}


def test_methods_are_trained_and_measured(tmp_path):
    _, found = run(tmp_path, ["msp", "mc-dropout", "ensemble", "tradi", "gaussian"])
    assert len(found) == 5
    for name, measures in found.items():
        assert measures["accuracy"] > 0.5, name
        assert 0 <= measures["ood_auroc"] <= 1
        assert measures["training_seconds"] > 0
    # One member: the slides' mean of logits is the plain softmax, calibrated or not it ranks alike.
    assert found["msp"]["paper_accuracy"] == pytest.approx(found["msp"]["accuracy"])
    assert found["msp"]["macs_share"] == 1
    assert found["mc-dropout"]["macs_share"] > 1
    assert found["mc-dropout"]["paper_nll"] != found["msp"]["paper_nll"]


def test_slides_and_own_figures_agree_where_their_scores_do(tmp_path):
    _, found = run(tmp_path, ["msp"], 'calibration = ["none"]\nood-score = ["confidence"]\n')
    for name in ("aupr", "fpr95"):
        assert found["msp"][f"ood_{name}_in"] == pytest.approx(found["msp"][f"paper_{name}"])
        assert found["msp"][f"ood_{name}_in"] != found["msp"][f"ood_{name}"]


def test_a_network_that_a_method_only_looks_at_is_trained_once(tmp_path):
    path = tmp_path / "s.toml"
    path.write_text(
        STUDY.replace("UQ", '["msp"]').replace("seed = [0]", 'seed = [0]\nscore = ["confidence", "entropy"]')
    )
    cuq.run_study(cuq.read_study(path), tmp_path / "out")
    assert len(list((tmp_path / "out" / "shared").glob("network-*.safetensors"))) == 1


@pytest.mark.parametrize(
    ("uq", "change", "message"),
    [
        ("msp", ('arch = "compress-uq:mlp"\n', ""), "a run needs arch"),
        ("msp", ('data = "digits"', 'data = "digitz"'), "did you mean 'digits'"),
        ("msp", ("seed = [0]", 'seed = [0]\nood = ["nowhere"]'), "unknown out-of-distribution set 'nowhere'"),
        ("msp", ("seed = [0]", 'seed = [0]\nood-score = ["auto"]'), "ood_score 'auto' chooses on"),
        ("tradi", ("epochs = 2", "epochs = 0"), "epochs=0: tradi is made of what it sees"),
        ("mps", ("", ""), "did you mean 'msp'"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_runs(tmp_path, uq, change, message):
    path = tmp_path / "s.toml"
    path.write_text(STUDY.replace("UQ", f'["{uq}"]').replace(*change))
    with pytest.raises(cuq.InputError, match=message):
        cuq.run_study(cuq.read_study(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ece_over_random_calibration_images():
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 4000)
    truth = random.normal(size=(1, 4000, 4))
    # Labels drawn from the softmax of these logits: logits twice as large are overconfident, and t = 2 mends it.
    p = np.exp(truth[0]) / np.exp(truth[0]).sum(1, keepdims=True)
    labels = (p.cumsum(1) > random.random((4000, 1))).argmax(1)
    logits = (2 * truth).astype(np.float32)
    mean, spread = resplit_ece(logits, labels, "temperature")
    raw, none_spread = resplit_ece(logits, labels, "none")
    q = np.exp(logits[0]) / np.exp(logits[0]).sum(1, keepdims=True)
    assert raw == pytest.approx(ece(q, labels), abs=4 * none_spread)
    assert mean < 0.03 < 0.1 < raw
    assert 0 < spread < 0.02
