"""Ensembles: what the members are, how they are told apart, and their way through every stage."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import Subset, TensorDataset

import compress_uq as cuq
from compress_uq.errors import InputError, ModelError, PruningError, UncertaintyError
from compress_uq.pruning.criteria.criterion import Evidence, perturbed
from compress_uq.shrinking import prune_and_finetune
from compress_uq.stages import Origin
from compress_uq.uncertain import UncertainModel
from compress_uq.uq import MSP, Ensemble, Networks, SingleMember, Trained
from small_models import Leaves, own, randomise

SHAPE = (1, 8, 8)
QUICK = cuq.TrainingConfig(epochs=2, lr=0.02, batch_size=32, device="cpu")
ARCH = cuq.Architecture("compress-uq:cnn", 4, SHAPE, {"widths": [16, 16], "hidden": [16]})


@pytest.fixture(autouse=True, scope="module")
def _few_resamples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuq.metrics.bootstrap, "RESAMPLES", 5)
        yield


def blobs(count, seed):
    """Four classes told apart by the brightness of a quarter."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    images = torch.randn(count, *SHAPE, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, (label // 2) * 4 : (label // 2) * 4 + 4, (label % 2) * 4 : (label % 2) * 4 + 4] += 0.8
    return TensorDataset(images, labels)


@pytest.fixture(scope="module")
def parts():
    return cuq.Splits(train=blobs(160, 0), calibration=blobs(80, 1), test=blobs(80, 2))


@pytest.fixture(scope="module")
def models(parts):
    """Two dense models of one architecture."""
    return [
        cuq.finetune(ARCH.build(seed), parts, training=replace(QUICK, seed=seed, epochs=3)).model for seed in (3, 4)
    ]


@pytest.fixture(scope="module")
def of_one(models, parts, _few_resamples):
    """A bundle of an ensemble of one dense model, with its control, and the stages that were told."""
    stages = []
    bundle = cuq.compress(
        models[0], parts, sparsity=0.5, uq=Ensemble(3), training=QUICK, arch=ARCH, control=True,
        progress=lambda event: stages.append(event.stage),
    )  # fmt: skip
    return bundle, stages


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_mean_is_that_of_each_networks_own_softmax(models):
    images = torch.randn(5, *SHAPE)
    answer = cuq.fit_uncertainty(models, method="ensemble", example_inputs=images)(images)
    with torch.no_grad():
        each = torch.stack([model(images).softmax(1) for model in models])
    assert torch.allclose(answer.probabilities, each.mean(0), atol=1e-6)
    chosen = each.gather(2, answer.label.view(1, -1, 1).expand(2, -1, 1)).squeeze(2)
    assert torch.allclose(answer.variance, chosen.var(0, correction=0), atol=1e-6)
    assert (answer.mutual_information > 0).all()


def test_an_ensemble_of_one_network_answers_as_that_network():
    model, images = randomise(own("cnn", SHAPE, widths=(8, 8))), torch.randn(4, *SHAPE)
    one, msp = (UncertainModel(members, MSP(), Origin(SHAPE)) for members in (Networks([model]), SingleMember(model)))
    assert all(torch.equal(a, b) for a, b in zip(one(images)[:8], msp(images)[:8], strict=True))


def test_features_are_those_of_each_network(models):
    members = Ensemble().fit(Trained(tuple(models), Origin(SHAPE)))
    _, features = members.with_features(torch.randn(3, *SHAPE))
    assert features.shape == (2, 3, 16)
    narrow = randomise(cuq.Architecture("compress-uq:cnn", 4, SHAPE, {"widths": [16, 16], "hidden": [8]}).build())
    assert Ensemble().fit(Trained((models[0], narrow), Origin(SHAPE))).head is None, "their features are not alike"


def test_members_of_one_model_differ_by_seed_and_by_what_is_pruned(of_one, models, parts):
    bundle, stages = of_one
    recipe = bundle.recipe
    assert [(m["seed"], m["perturbation"]) for m in recipe["members"]] == [(0, 0.0), (1, 1.0), (2, 1.0)]
    assert {json.dumps(m["channels"]) for m in recipe["members"]} == {json.dumps(recipe["pruning"]["channels"])}
    assert [s for s in dict.fromkeys(stages) if "tuning" in s] == [f"member {i}/3: fine-tuning" for i in (1, 2, 3)]
    networks = bundle.model.members.networks
    alone = cuq.compress(models[0], parts, sparsity=0.5, uq="msp", training=QUICK).model.members.networks[0]
    assert same(networks[0], alone), "the first member is what a run without an ensemble gives"
    plan = cuq.plan_compression(models[0], parts, sparsity=0.5, uq=Ensemble(3), training=QUICK)
    removed = [tuple(layer.removed for layer in network.layers) for network in plan.networks]
    assert len(set(removed)) == 3
    column = bundle.card.compressed.cost
    assert column.macs == sum(network.after.macs for network in plan.networks) == plan.uncertainty["macs"]
    assert column.parameters == sum(network.after.parameters for network in plan.networks)
    assert plan.uncertainty["share_of_dense_pass"] == pytest.approx(column.macs / bundle.card.dense.cost.macs)
    assert cuq.plan_compression(models[0], parts, sparsity=0.5, uq="ensemble").method.samples == 5


def test_the_control_is_an_ensemble_of_the_dense_model(of_one):
    card = of_one[0].card
    assert card.control.cost.parameters == 3 * card.dense.cost.parameters
    assert card.control.cost.training_seconds > 0
    assert card.control.prediction.mutual_information.max() > 0
    assert [s for s in dict.fromkeys(of_one[1]) if s.endswith(": control")] == [
        f"member {i}/3: control" for i in (1, 2, 3)
    ]


def test_it_is_saved_loaded_and_verified(of_one, tmp_path):
    bundle, _ = of_one
    folder = bundle.save(tmp_path / "b")
    back, images = cuq.Bundle.load(folder), torch.randn(3, *SHAPE)
    assert all(torch.equal(a, b) for a, b in zip(bundle.model(images)[:8], back.model(images)[:8], strict=True))
    assert back.model.method == Ensemble(3)
    assert cuq.verify(folder).checks["members"].found.startswith("variance")
    onnx = cuq.OnnxPredictor(folder / "model.onnx")(images.numpy())
    assert np.allclose(onnx.mutual_information, bundle.model(images).mutual_information, atol=1e-5)


def test_a_list_is_pruned_one_by_one_and_may_have_other_widths_in_each(models, parts, tmp_path):
    bundle = cuq.compress(
        models, parts, sparsity=0.4, scope="global", round_to=1, uq="ensemble", training=QUICK, arch=ARCH
    )
    assert [(m["seed"], m["perturbation"]) for m in bundle.recipe["members"]] == [(0, 0.0), (1, 0.0)]
    assert bundle.recipe["members"][0]["channels"] != bundle.recipe["members"][1]["channels"]
    images = parts.test.tensors[0]
    with torch.no_grad():
        each = torch.stack([model(images).softmax(1) for model in models])
    assert np.allclose(bundle.card.dense.prediction.probabilities, each.mean(0), atol=1e-5)
    assert bundle.card.dense.cost.parameters == sum(p.numel() for model in models for p in model.parameters())
    assert bundle.model.origin.dense_cost.macs == bundle.card.dense.cost.macs // 2, "one dense pass is of one model"
    assert not any(model.training for model in models)
    back = cuq.Bundle.load(bundle.save(tmp_path / "b"))
    assert torch.equal(back.model(images).probabilities, bundle.model(images).probabilities)


def test_each_member_of_a_list_has_its_own_teacher(models, parts, monkeypatch):
    taught = []
    fit = cuq.steps.fit_network

    def watch(*a, teacher, **k):
        taught.append(teacher)
        return fit(*a, teacher=teacher, **k)

    monkeypatch.setattr(cuq.steps, "fit_network", watch)
    method = Ensemble(4).of_models(2)
    shrunk = prune_and_finetune(models, parts, pruning={"sparsity": 0.5}, method=method, training=QUICK)
    assert [teacher is model for teacher, model in zip(taught, models * 2, strict=True)] == [True] * 4
    assert [(s.seed, s.perturbation) for s in shrunk] == [(0, 0.0), (1, 0.0), (2, 1.0), (3, 1.0)]


def test_a_bootstrapped_member_sees_images_drawn_with_replacement(models, parts, monkeypatch):
    method, train = Ensemble(2, bootstrap=True), blobs(2000, 0)
    drawn = [method.training_images(train, seed) for seed in (0, 0, 1)]
    assert all(isinstance(d, Subset) and len(d) == 2000 for d in drawn)
    assert drawn[0].indices == drawn[1].indices != drawn[2].indices
    assert len(set(drawn[0].indices)) / 2000 == pytest.approx(1 - np.exp(-1), abs=0.03)
    assert Ensemble(2).training_images(train, 1) is train
    seen = []
    fit = cuq.steps.fit_network
    monkeypatch.setattr(cuq.steps, "fit_network", lambda m, data, *a, **k: seen.append(data) or fit(m, data, *a, **k))
    prune_and_finetune(models[:1], parts, pruning={"sparsity": 0.5}, method=method, training=QUICK)
    assert [s.indices == method.training_images(parts.train, i).indices for i, s in enumerate(seen)] == [True, True]


def test_a_run_that_was_killed_goes_on(models, parts, tmp_path):
    class KilledError(Exception):
        pass

    plain = Ensemble(2)

    def run(work, progress=cuq.progress.silent, method=plain):
        return prune_and_finetune(
            models[:1], parts, pruning={"sparsity": 0.5}, method=method, training=QUICK, work_dir=work,
            progress=progress,
        )  # fmt: skip

    def kill(event):
        if event.stage == "member 2/2: fine-tuning" and event.step > 5:
            raise KilledError

    with pytest.raises(KilledError):
        run(tmp_path, kill)
    told = []
    resumed = run(tmp_path, lambda event: told.append((event.stage, event.step)))
    assert told[0] == ("member 2/2: fine-tuning", 6), "the first member and an epoch of the second were not repeated"
    for one, other in zip(run(None), resumed, strict=True):
        assert same(one.tuned.model, other.tuned.model)
    told.clear()
    run(tmp_path, lambda event: told.append((event.stage, event.step)), Ensemble(2, bootstrap=True))
    assert told[0] == ("member 1/2: fine-tuning", 1), "other images, another training"


def test_noise_on_scores_by_hand():
    scores = [torch.tensor([0.0, 2.0, 4.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)]
    evidence = Evidence(torch.nn.Identity(), torch.zeros(1), seed=5)
    assert all(torch.equal(a, b) for a, b in zip(perturbed(scores, evidence), scores, strict=True))
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(3, generator=generator, dtype=torch.float64)
    first, second = perturbed(scores, replace(evidence, perturbation=0.5))
    assert torch.allclose(first, scores[0] + 0.5 * np.sqrt(8 / 3) * noise)
    assert torch.equal(second, scores[1]), "equal scores stay no order at all"


def test_noise_changes_which_channels_go_and_not_how_many(models):
    def cut(**options):
        return cuq.prune(models[0], torch.zeros(1, *SHAPE), sparsity=0.4, round_to=1, scope="global", **options).layers

    plain = cut()
    others = [cut(perturbation=1.0, seed=seed) for seed in range(3)]
    assert len({tuple(layer.removed for layer in layers) for layers in others}) == 3
    assert {tuple(layer.after for layer in layers) for layers in others} == {tuple(layer.after for layer in plain)}
    assert cut(seed=7) == plain


def test_several_models_in_one_checkpoint(models, parts, tmp_path):
    cuq.save_model(models, tmp_path / "m.pt", arch=ARCH, labels="abcd")
    back = cuq.read_checkpoint(tmp_path / "m.pt")
    assert [same(a, b) for a, b in zip(back.models, models, strict=True)] == [True, True]
    assert back.labels == tuple("abcd")
    with pytest.raises(ModelError, match="holds 2 models.*read_checkpoint"):
        cuq.load_model(tmp_path / "m.pt")
    assert cuq.evaluate(list(back.models), parts).metrics == cuq.evaluate(models, parts).metrics
    assert torch.load(tmp_path / "m.pt", weights_only=True)["format_version"] == 2
    cuq.save_model(models[:1], tmp_path / "one.pt", arch=ARCH)
    assert torch.load(tmp_path / "one.pt", weights_only=True)["format_version"] == 1, "older releases read it"
    assert same(cuq.load_model(tmp_path / "one.pt"), models[0])


def test_the_command_line_from_training_to_prediction(command, tmp_path):
    line = "train --arch compress-uq:mlp --arch-option widths=16 --data digits --epochs 1 --uq ensemble --samples 2"
    code, out, err = command(*line.split(), "--out", "m.pt", "--json")
    assert code == 0, err
    assert len(json.loads(out)["history"]) == 2
    first, second = cuq.read_checkpoint("m.pt").models
    assert not same(first, second)
    code, out, _ = command("evaluate", "m.pt", "--ood", "synthetic", "--json")
    dense = json.loads(out)
    run = ["prune", "m.pt", "--sparsity", 0.5, "--epochs", 1, "--ood", "synthetic", "--json"]
    code, _, err = command(*run)
    assert code == 2
    assert "mc-dropout takes one model, 2 were given" in err
    code, _, err = command(*run, "--uq", "ensemble", "--samples", 3)
    assert code == 2
    assert "3 members of 2 models" in err
    code, out, err = command(*run, "--uq", "ensemble", "--resume")
    assert code == 0, err
    report = json.loads(out)
    assert report["dense"]["metrics"] == dense["metrics"]
    assert report["recipe"]["uncertainty"]["options"]["samples"] == 2
    assert sorted(f.name for f in tmp_path.iterdir()) == ["m-compressed", "m.pt"]
    assert command("verify", "m-compressed")[0] == 0
    assert command("export", "m-compressed", "--out", "again.onnx")[0] == 0
    from PIL import Image

    Image.fromarray(np.full((8, 8), 200, np.uint8)).save("0.png")
    code, out, _ = command("predict", "again.onnx", "0.png", "--json")
    assert code == 0
    assert json.loads(out)[0]["mutual_information"] > 0


def test_a_dense_model_trained_with_dropout_is_a_plain_checkpoint(command):
    line = "train --arch compress-uq:cnn --arch-option widths=8,8 --data digits --epochs 1 --seed 1 --out"
    assert command(*line.split(), "plain.pt")[0] == 0
    code, _, err = command(*line.split(), "drop.pt", "--uq", "mc-dropout", "--dropout", 0.4)
    assert (code, "note:" in err) == (0, False)
    plain, drop = cuq.read_checkpoint("plain.pt"), cuq.read_checkpoint("drop.pt")
    assert plain.model.state_dict().keys() == drop.model.state_dict().keys()
    assert not same(plain.model, drop.model)
    assert (plain.training["uq"], drop.training["uq"]) == ("msp", "mc-dropout")
    images = torch.randn(3, *SHAPE)
    assert torch.equal(drop.model.train()(images), drop.model(images)), "no dropout is left in it"


def test_a_study_finds_what_compress_finds(tmp_path):
    (tmp_path / "s.toml").write_text(
        f'[defaults]\nmodel = "{tmp_path}/two.pt"\nuq = "ensemble"\nepochs = 1\nood = ["synthetic"]\nround-to = 2\n'
        "[grid]\nsparsity = [0.5]\n"
    )
    cuq.train_dense(
        tmp_path / "two.pt", arch="compress-uq:cnn", data="digits", options={"widths": [8, 8]}, uq=Ensemble(2),
        training=QUICK,
    )  # fmt: skip
    (run,) = cuq.run_study(tmp_path / "s.toml", tmp_path / "out").runs
    opened = cuq.open_model_and_data(tmp_path / "two.pt", ood=["synthetic"])
    card = cuq.compress(
        list(opened.checkpoint.models), opened.splits, sparsity=0.5, round_to=2, uq="ensemble", epochs=1
    ).card
    for prefix, column in (("", card.compressed), ("dense_", card.dense), ("dense_calibrated_", card.dense_calibrated)):
        for name, figure in column.metrics.items():
            assert run.measure(prefix + name) == pytest.approx(figure.value, abs=1e-9), prefix + name
    assert run.measure("macs") == card.compressed.cost.macs
    assert run.measure("dense_macs") == card.dense.cost.macs


def test_a_size_within_a_budget_is_found_with_all_members(models, parts):
    found = cuq.search_sparsity(
        models[0], parts, ["accuracy_drop<=1"], pruning={"round_to": 1}, method=Ensemble(2), training=QUICK, epochs=1,
        trials=1,
    )  # fmt: skip
    assert found.trials[0].holds


def test_what_no_ensemble_is_made_of(models, parts):
    one, other = models
    images = torch.zeros(1, *SHAPE)
    wide = randomise(own("mlp", (1, 8, 8), widths=(8,)))
    with pytest.raises(UncertaintyError, match="needs several models: pass a list"):
        cuq.fit_uncertainty(one, method="ensemble", example_inputs=images)
    with pytest.raises(UncertaintyError, match="members 1 and 3 of the ensemble have the same weights"):
        cuq.fit_uncertainty([one, other, one], method="ensemble", example_inputs=images)
    with pytest.raises(UncertaintyError, match="member 2 of the ensemble has 10 classes and the first has 4"):
        cuq.fit_uncertainty([one, wide], method="ensemble", example_inputs=images)
    with pytest.raises(UncertaintyError, match="member 2 of the ensemble does not run on images of shape"):
        cuq.fit_uncertainty([one, Leaves(4)], method="ensemble", example_inputs=images)
    with pytest.raises(UncertaintyError, match="samples=3, and 2 models"):
        cuq.fit_uncertainty(models, method=Ensemble(3), example_inputs=images)
    with pytest.raises(InputError, match="no model was given"):
        cuq.fit_uncertainty([], method="ensemble")
    with pytest.raises(InputError, match="ensemble needs the shape of an image"):
        cuq.fit_uncertainty(models, method="ensemble")
    named = [
        cuq.finetune(one, replace(parts, info=cuq.DataInfo(labels=labels)), epochs=0, method="msp")
        for labels in (tuple("abcd"), tuple("abdc"))
    ]
    with pytest.raises(InputError, match="model 1 takes or answers labels .* and model 2"):
        cuq.fit_uncertainty(named, method="ensemble")


def test_runs_that_cannot_be(models, parts):
    for method in ("mc-dropout", "msp"):
        with pytest.raises(UncertaintyError, match=f"{method} takes one model, 2 were given"):
            cuq.compress(models, parts, sparsity=0.5, uq=method)
    with pytest.raises(UncertaintyError, match="3 members of 2 models"):
        cuq.compress(models, parts, sparsity=0.5, uq=Ensemble(3))
    with pytest.raises(ModelError, match="model 2 is of another architecture than the first"):
        cuq.compress([models[0], randomise(own("mlp", SHAPE))], parts, sparsity=0.5, uq="ensemble")
    with pytest.raises(InputError, match="several models were given"):
        cuq.compress(models, parts, sparsity=0.5, uq="ensemble", initial=models[0])
    with pytest.raises(UncertaintyError, match="have the same weights: train them apart"):
        cuq.compress(models[0], parts, sparsity=0.5, uq=Ensemble(2, perturbation=0.0), epochs=0)
    for options in ({"samples": 1}, {"samples": 0}, {"perturbation": -1.0}, {"perturbation": float("nan")}):
        with pytest.raises(InputError, match=str(next(iter(options.values())))):
            Ensemble(**options)
    with pytest.raises(PruningError, match="nothing was pruned"):
        cuq.plan_compression(models, parts, sparsity=0.01, uq="ensemble")
