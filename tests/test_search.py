"""The smallest model within a budget, and how much each layer bears."""

import json

import pytest

import compress_uq as cuq
from compress_uq.errors import InputError, PruningError, UnknownNameError
from compress_uq.uq import MSP

QUICK = cuq.TrainingConfig(lr=0.02, device="cpu")


def searched(dense, splits, budget, **options):
    options = {"pruning": {"round_to": 1}, "method": MSP(), "training": QUICK, "epochs": 1, "trials": 3, **options}
    return cuq.search_sparsity(dense.model, splits, budget, **options)


def test_a_budget_nobody_can_miss_takes_the_largest_size_tried(dense, splits):
    found = searched(dense, splits, ["accuracy_drop<=1"])
    assert [trial.sparsity for trial in found.trials] == pytest.approx([0.475, 0.7125, 0.8312], abs=1e-4)
    assert found.sparsity == found.trials[-1].sparsity
    assert all(trial.holds for trial in found.trials)
    shares = [trial.parameters_share for trial in found.trials]
    assert shares == sorted(shares, reverse=True)
    assert "calibration" in found.images
    assert json.loads(json.dumps(found.to_json()))["budgets"] == ["accuracy_drop<=1"]


def test_bisection_goes_down_after_a_miss_and_up_after_a_hit(dense, splits):
    found = searched(dense, splits, [cuq.Budget("accuracy_drop", 0.05), "nll<=0.5"], trials=4)
    low, high = 0.0, 0.95
    for trial in found.trials:
        assert trial.sparsity == pytest.approx((low + high) / 2, abs=1e-4)
        within = trial.measures["accuracy_drop"] <= 0.05 and trial.measures["nll"] <= 0.5
        assert trial.holds == within
        low, high = (trial.sparsity, high) if within else (low, trial.sparsity)
    assert found.sparsity == max(trial.sparsity for trial in found.trials if trial.holds)
    assert not all(trial.holds for trial in found.trials), "the budget must bind"


def test_no_size_within_the_budget_names_the_nearest_miss(dense, splits):
    with pytest.raises(PruningError, match=r"at sparsity 0.11\d+ accuracy_drop .* budget accuracy_drop<=-0.5"):
        searched(dense, splits, ["accuracy_drop<=-0.5"])


def test_a_global_search_stays_below_the_cap_of_a_layer(dense, splits):
    found = searched(dense, splits, ["accuracy_drop<=1"], pruning={"scope": "global", "round_to": 1}, trials=4)
    assert found.sparsity == max(trial.sparsity for trial in found.trials) < 0.9


def test_a_search_that_ends_at_sizes_with_nothing_to_remove_says_so(dense, splits):
    with pytest.raises(PruningError, match="no size was found within the budget.*nothing was pruned"):
        searched(dense, splits, ["accuracy_drop<=-1"], pruning={"round_to": 32}, trials=6)


def test_budgets_that_cannot_be(dense, splits):
    with pytest.raises(InputError, match="accuracy_drop<=0.01"):
        cuq.Budget.parse("accuracy drop 1")
    with pytest.raises(UnknownNameError, match="did you mean 'accuracy_drop'"):
        cuq.Budget.parse("accuracy_dro<=0.1")
    with pytest.raises(PruningError, match="the budget decides"):
        searched(dense, splits, ["ece<=0.1"], pruning={"sparsity": 0.5})
    with pytest.raises(InputError, match="no budget"):
        searched(dense, splits, [])


def test_the_trace_is_in_the_report(command, tmp_path):
    mlp = "compress-uq:mlp"
    assert command("train", "--arch", mlp, "--data", "digits", "--epochs", 1, "--out", "m.pt")[0] == 0
    options = ("--uq", "msp", "--round-to", 1, "--epochs", 1, "--out", "b", "--json")
    code, out, err = command("prune", "m.pt", "--budget", "accuracy_drop<=0.5", *options)
    assert code == 0, err
    recipe = json.loads(out)["recipe"]["pruning"]
    assert recipe["sparsity"] == recipe["search"]["sparsity"]
    assert len(recipe["search"]["trials"]) == 5
    assert "Search" in err
    code, _, err = command("prune", "m.pt", "--budget", "ece<0.1", "--out", "c")
    assert code == 2
    assert "'ece<0.1'" in err
    assert not (tmp_path / "c").exists()


def test_sensitivity_blames_the_layer_that_hurts(dense, splits):
    found = cuq.sensitivity(dense.model, splits, ratios=(0.25, 0.9), training=QUICK)
    layers = {trial.layer: trial.channels for trial in found.trials}
    assert len(found.trials) == 2 * len(layers)
    by_layer = {(trial.layer, trial.ratio): trial.measures["nll"] for trial in found.trials}
    assert max(by_layer.values()) > found.dense["nll"]
    mean = [sum(by_layer[name, ratio] for name in layers) / len(layers) for ratio in (0.25, 0.9)]
    assert mean[1] > mean[0] > 0
    name = next(iter(layers))
    alone = cuq.prune(
        dense.model, splits.example(), sparsity={name: 0.25}, round_to=1, splits=splits, training=QUICK, seed=QUICK.seed
    )
    assert [layer.name for layer in alone.layers if layer.removed] == [name]


def test_what_sensitivity_leaves_out_and_refuses(dense, splits):
    found = cuq.sensitivity(dense.model, splits, ratios=(0.02, 0.5), training=QUICK)
    small = {trial.layer for trial in found.trials if trial.ratio == 0.02}
    assert small == {trial.layer for trial in found.trials if trial.channels >= 50} != {t.layer for t in found.trials}
    for bad, message in (
        ({"ratios": (0.0001,)}, "no channel of any layer"), ({"ratios": (1.5,)}, "ratio 1.5"),
        ({"pruning": {"criterion": "resrep"}}, "trains the model"), ({"pruning": {"sparsity": 0.5}}, "sparsity=0.5"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            cuq.sensitivity(dense.model, splits, training=QUICK, **bad)


def test_the_sensitivity_command_writes_a_table_and_a_plot(checkpoint, command, tmp_path):
    code, out, err = command("sensitivity", checkpoint, "--ratios", "0.5", "--out", "s", "--json")
    assert code == 0, err
    found = json.loads(out)
    lines = (tmp_path / "s" / "sensitivity.csv").read_text().splitlines()
    assert len(lines) == 1 + len(found["trials"])
    assert (tmp_path / "s" / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "s" / "sensitivity.md").read_text()
    assert all(f"| {trial['layer']} | {trial['channels']} | 0.5 |" in page for trial in found["trials"])
    code, _, err = command("sensitivity", checkpoint, "--ratios", "1.5", "--out", "t")
    assert code == 2
    assert "1.5" in err
    assert not (tmp_path / "t").exists()
