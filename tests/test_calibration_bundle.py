"""A bundle calibrated again: the same weights, other answers, and a card that says what changed."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

import compress_uq as cuq
from compress_uq.errors import ArtifactError, CalibrationError, DataError
from compress_uq.metrics import Figure
from compress_uq.report import broken, lost_classes, of_compressed
from compress_uq.storage import sha256
from small_models import Leaves
from test_calibration import fittable


def drifted(count, seed, loudness=4.0):
    """Four classes told apart by the brightness of a quarter; newer images are louder, and answers surer."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    images = torch.randn(count, 3, 32, 32, generator=generator)
    for i, label in enumerate(labels.tolist()):
        images[i, :, (label // 2) * 16 :, (label % 2) * 16 :] += 0.15
    return TensorDataset(images * loudness, labels)


@pytest.fixture(scope="module")
def old():
    splits = cuq.Splits(
        train=drifted(200, 0, 1.0), calibration=drifted(100, 1, 1.0), test=drifted(100, 2, 1.0),
        ood={"noise": drifted(40, 3, 1.0)},
    )  # fmt: skip
    method = cuq.uq.MCDropout(p=0.2, samples=6)
    torch.manual_seed(0)
    dense = cuq.finetune(Leaves(4), splits, epochs=5, lr=0.02).model
    return cuq.compress(dense, splits, sparsity=0.5, uq=method, epochs=3, lr=0.02, calibration="auto")


@pytest.fixture(scope="module")
def newer():
    return cuq.Splits(calibration=drifted(300, 5), test=drifted(300, 6))


@pytest.fixture(scope="module")
def new(old, newer):
    return cuq.recalibrate(old, newer)


def tensors(bundle, folder):
    return load_file(bundle.save(folder) / "model.safetensors")


def test_the_choice_of_auto_is_in_the_recipe(old):
    recipe = old.report.to_json()["recipe"]
    assert recipe["calibration"] == "auto"
    assert recipe["calibration_choice"]["name"] == old.model.calibrator.name
    assert set(recipe["calibration_choice"]["nll"]) | set(recipe["calibration_choice"]["skipped"]) == set(
        cuq.calibration.CALIBRATORS.names
    )


def test_weights_stay_bit_by_bit_and_answers_change(old, new, newer, tmp_path):
    before, after = tensors(old, tmp_path / "old"), tensors(new, tmp_path / "new")
    kept = [name for name in before if not name.startswith("calibrator.")]
    assert kept
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert {name for name in after if not name.startswith("calibrator.")} == set(kept)
    images = newer.test.tensors[0][:8]
    assert not torch.equal(old.model(images).probabilities, new.model(images).probabilities)
    assert torch.equal(old.model.member_logits(images), new.model.member_logits(images))


def test_the_card_says_what_changed_on_the_same_images(old, new, newer):
    report = new.report.to_json()
    changed = report["recalibration"]
    for name in ("accuracy", "nll", "brier", "ece"):
        for side, model in (("before", old.model), ("after", new.model)):
            assert changed[side][name]["value"] == cuq.evaluate(model, newer).metrics[name].value
    assert changed["after"]["nll"]["value"] < changed["before"]["nll"]["value"]
    assert changed["after"]["ece"]["value"] < changed["before"]["ece"]["value"]
    assert report["compressed"]["metrics"]["ece"] == changed["after"]["ece"]
    assert report["onnx"]["metrics"]["nll"]["value"] == pytest.approx(changed["after"]["nll"]["value"], abs=1e-4)
    assert report["dense"] == old.report.to_json()["dense"]
    assert any("calibrated again on" in text for text in report["warnings"])
    recipe = report["recipe"]
    assert recipe["recalibration"]["of"] == cuq.bundle.recipe_hash(old.recipe)
    assert recipe["recalibration"]["data"]["images"] == {"calibration": 300, "test": 300}
    assert recipe["pruning"] == old.recipe["pruning"]
    assert "## Calibrated again on" in new.report.to_markdown()
    assert "noise" in new.report.to_markdown()


OF_COMPRESSED = (
    "compressed is not calibrated: every calibration image is classified right",
    "the OOD score ranks noise worse than chance, AUROC 0.4000: its images pass for in-distribution",
    *lost_classes([{"class": "3", "dense": 0.8, "compressed": 0.1, "change": -0.7, "lost": 30, "gained": 0,
                    "p_value": 1e-9}]),
    *broken({"selective_risk": Figure(0.4, 0.3, 0.5), "set_coverage": Figure(0.5, 0.4, 0.6)},
            {"acceptance": {"risk": 0.1}, "sets": {"coverage": 0.9, "images": 100}}, 100),
)  # fmt: skip
OF_OTHERS = (
    "dense_calibrated is not calibrated: every calibration image is classified right",
    "the OOD score ranks letters worse than chance, AUROC 0.4000: its images pass for in-distribution",
    "the dense model scores 0.100 on its own data, near chance: a wrong --mean or --std",
)


@pytest.fixture(scope="module")
def another(old, newer):
    """Calibrated again otherwise, of a first card that warns of everything."""
    warned = {**old.report_json, "warnings": [*old.report_json["warnings"], *OF_COMPRESSED, *OF_OTHERS]}
    return cuq.recalibrate(replace(old, report_json=warned), replace(newer, ood={"noise": drifted(40, 8)}),
                           method="vector")  # fmt: skip


def test_the_card_names_one_calibrator_and_its_figures(another):
    report = another.report.to_json()
    after, compressed = report["calibration"]["after"], report["compressed"]["metrics"]
    names = [report["recipe"]["calibration"], report["recipe"]["calibrator"], after["calibration"]]
    assert [*names, report["recalibration"]["after"]["calibration"]] == ["vector"] * 4
    assert {name: after[name] for name in ("ece", "nll", "brier")} == {
        name: compressed[name] for name in ("ece", "nll", "brier")
    }
    assert report["calibration"]["before"]["nll"]["value"] > after["nll"]["value"]
    assert '"temperature"' not in json.dumps(report["recipe"] | {"calibration_choice": None})


def test_what_is_of_the_first_run_is_named_so(another, old):
    report, first = another.report.to_json(), old.report.to_json()
    page, table = another.files["report.html"].decode(), another.report.to_markdown()
    assert report["class_changes"] == []
    assert "Which classes changed?" not in page
    assert "| | dense (first run) | dense_calibrated (first run) | compressed | onnx |" in table
    assert "<th>dense (first run)</th>" in page
    assert "| class | dense (first run) | compressed |\n|---|---|---|\n| 0 | " in table
    changed = report["recalibration"]
    shown = [f"{changed[side]['accuracy']['value'] * 100:.2f} % {side}" for side in ("before", "after")]
    assert f"Calibrated again on caller&#x27;s splits. Accuracy {shown[0]}, {shown[1]};" in page
    assert "<li>method: mc-dropout</li>" in page
    seconds = [card["compressed"]["cost"]["training_seconds"] for card in (first, report)]
    assert seconds[0] == seconds[1] > 0
    assert report["onnx"]["cost"]["training_seconds"] is first["onnx"]["cost"]["training_seconds"] is None
    assert "Spearman of MI, 6 and 204 samples, first run" in table
    assert report["conventions"]["samples"] == first["conventions"]["samples"]
    assert report["conventions"]["first_run"].startswith("the columns dense, dense_calibrated and control")


def test_warnings_of_what_is_measured_again_go_and_others_stay(another, newer):
    texts = another.report.to_json()["warnings"]
    assert not [text for text in texts if text.removeprefix("first run: ") in OF_COMPRESSED]
    assert [text for text in texts if text.startswith("first run: ")][-3:] == [f"first run: {t}" for t in OF_OTHERS]
    # Once more: the first run's stay, named once, and the last calibration's are not of this card.
    third = cuq.recalibrate(another, replace(newer, info=replace(newer.info, name="third")), method="none")
    again = third.report.to_json()["warnings"]
    assert [text for text in again if text.startswith("first run: ")][-3:] == [f"first run: {t}" for t in OF_OTHERS]
    assert [text for text in again if text.startswith("calibrated again on")][0].startswith("calibrated again on third")
    assert sum(text.startswith("calibrated again on") for text in again) == 1
    assert third.report.to_json()["calibration"] is None


def test_every_suspicion_of_the_compressed_model_is_known_as_one(old, newer):
    """Warnings as they are worded, so that a stale one is recognised."""
    right = cuq.evaluate(old.model, newer)
    labels = (right.prediction.label + (np.arange(300) % 10 > 0)) % 4  # a tenth is right
    wrong = TensorDataset(newer.test.tensors[0], torch.as_tensor(labels))
    prediction = right.prediction._replace(uncertainty=-right.prediction.uncertainty)
    low = Figure(0.4, 0.3, 0.5)
    bad = replace(
        right, prediction=prediction, labels=labels, ood={"noise": {"auroc": low}},
        metrics={**right.metrics, "error_auroc": low, "ause": Figure(9.0, 9.0, 9.0)},
    )  # fmt: skip
    found = cuq.report.suspicions(old.model, replace(newer, test=wrong), bad)
    assert len(found) == 4
    assert all(of_compressed(text, ["noise"]) for text in (*found, *OF_COMPRESSED))
    assert not any(of_compressed(text, ["noise"]) for text in OF_OTHERS)


def test_the_new_bundle_is_a_bundle(new, newer, tmp_path):
    folder = new.save(tmp_path / "b")
    checks = cuq.verify(folder, model=lambda: Leaves(4)).checks
    assert checks["parity"].found.startswith("largest")
    back = cuq.Bundle.load(folder, model=lambda: Leaves(4))
    assert back.report.to_json() == new.report.to_json()
    assert back.report.to_markdown() == new.report.to_markdown()
    images = newer.test.tensors[0][:8]
    assert torch.equal(back.model(images).probabilities, new.model(images).probabilities)
    again = cuq.recalibrate(back, newer, method="none")
    assert again.model.calibrator.name == "none"
    assert again.recipe["recalibration"]["of"] == cuq.bundle.recipe_hash(new.recipe)


@pytest.mark.parametrize("name", ["beta", "dirichlet"])
def test_a_calibrator_of_the_mean_is_saved_and_loaded(name, old, newer, tmp_path):
    fittable(name)
    new = cuq.recalibrate(old, newer, method=name)
    back = cuq.Bundle.load(new.save(tmp_path / name), model=lambda: Leaves(4))
    images = newer.test.tensors[0][:8]
    assert back.model.calibrator.name == name
    assert torch.equal(back.model(images).probabilities, new.model(images).probabilities)
    assert np.allclose(
        cuq.OnnxPredictor(tmp_path / name / "model.onnx")(images.numpy()).probabilities,
        new.model(images).probabilities.numpy(), atol=1e-5,
    )  # fmt: skip


def as_format_1(folder):
    """The folder as format 1 had it: one network, a calibrator's name, and no other parts."""
    structure = json.loads((folder / "structure.json").read_text())
    for part in ("score", "ood_score", "acceptance", "sets"):
        del structure[part]
    (structure["network"],) = structure.pop("networks")
    structure |= {"format_version": 1, "calibrator": structure["calibrator"]["name"]}
    (folder / "structure.json").write_text(json.dumps(structure))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["format_version"] = 1
    manifest["sha256"]["structure.json"] = sha256(folder / "structure.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_bundle_of_format_1_is_read_and_calibrated_again(bundle_folder, tmp_path):
    folder = shutil.copytree(bundle_folder, tmp_path / "one")
    as_format_1(folder)
    assert set(load_file(folder / "model.safetensors")) >= {"calibrator.log_temperature"}
    first, now = cuq.Bundle.load(folder), cuq.Bundle.load(bundle_folder)
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(first.model(images).probabilities, now.model(images).probabilities)
    new = cuq.recalibrate(first, cuq.load_new_data(first, "digits"), method="vector")
    cuq.verify(new.save(tmp_path / "two"))
    assert json.loads((tmp_path / "two" / "structure.json").read_text())["calibrator"]["name"] == "vector"


def test_what_cannot_be_calibrated_again_is_refused(old, newer):
    with pytest.raises(DataError, match="'test'"):
        cuq.recalibrate(old, cuq.Splits(calibration=newer.calibration))
    with pytest.raises(DataError, match="'calibration'"):
        cuq.recalibrate(old, cuq.Splits(test=newer.test))
    few = TensorDataset(*(t[:3] for t in newer.calibration.tensors))
    with pytest.raises(CalibrationError, match="3 calibration images for 4 classes"):
        cuq.recalibrate(old, replace(newer, calibration=few))
    broken = old.model.but()
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.inf)
    with pytest.raises(CalibrationError, match="300 of 300 calibration images are NaN or infinite"):
        cuq.recalibrate(replace(old, uncertain=broken), newer)


def test_other_classes_are_refused(bundle_folder):
    bundle = cuq.Bundle.load(bundle_folder)
    splits = cuq.load_new_data(bundle, "digits")
    turned = replace(splits, info=replace(splits.info, labels=splits.info.labels[::-1]))
    with pytest.raises(DataError, match="name the class folders"):
        cuq.recalibrate(bundle, turned)
    with pytest.raises(ArtifactError, match="--arch"):
        cuq.recalibrate(replace(bundle, uncertain=None), splits)


def folder_of_digits(path, noise=30):
    """Every third digit as an image file in a folder of its class, noisier than those trained on."""
    from sklearn.datasets import load_digits

    random = np.random.default_rng(0)
    loaded = load_digits()
    for i in range(0, len(loaded.target), 3):
        pixels = loaded.images[i] * 255 / 16 + random.normal(size=(8, 8)) * noise
        folder = path / str(loaded.target[i])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return path


def test_the_command_takes_a_folder_that_is_new_as_a_whole(command, bundle_folder, tmp_path):
    folder_of_digits(tmp_path / "newer")
    shutil.copytree(bundle_folder, tmp_path / "b")
    line = ["calibrate", "b", "--data", "newer", "--calibration", "auto"]
    code, out, err = command(*line, "--json")
    assert code == 0, err
    report = json.loads(out)
    sizes = report["recipe"]["recalibration"]["data"]["images"]
    assert sizes["calibration"] == pytest.approx(4 * sizes["test"], rel=0.05)
    assert sum(sizes.values()) == 599
    assert report["recalibration"]["after"]["nll"]["value"] < report["recalibration"]["before"]["nll"]["value"]
    assert "Calibrated again on newer" in err
    code, _, err = command("verify", "b-recalibrated", "--data", "newer")
    assert code == 0, err
    code, _, err = command(*line)
    assert code == 2
    assert "--overwrite" in err
    assert command(*line, "--overwrite")[0] == 0
    assert cuq.load_new_data(cuq.Bundle.load("b"), "newer").train is None


def test_the_command_divides_known_data_as_before(command, bundle_folder):
    code, out, err = command("calibrate", bundle_folder, "--data", "digits", "--out", "new", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["recalibration"]["after"]["calibration"] == "temperature"
    source = report["recipe"]["recalibration"]["data"]["calibration"]
    assert source.startswith("a class-balanced fifth of the test split (70 images), since a bundle does not keep which")
    assert "(70 images)" in err
    assert "no training of these weights" not in err + out
    code, out, _ = command("evaluate", "new", "--json")
    assert json.loads(out)["metrics"]["ece"] == pytest.approx(report["onnx"]["metrics"]["ece"])
    code, _, err = command("verify", "new", "--data", "digits")
    assert code == 0, err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "digitz"], "digitz"),
        (["--data", "digits", "--calibration", "temprature"], "did you mean 'temperature'"),
        (["--data", "digits", "--mean", "a"], "--mean 'a'"),
        ([], "--data"),
    ],
)
def test_bad_input_leaves_nothing(command, bundle_folder, tmp_path, arguments, said):
    code, _, err = command("calibrate", bundle_folder, "--out", "new", *arguments)
    assert code == 2
    assert said in err
    assert not (tmp_path / "new").exists()
    assert "Traceback" not in err


def test_a_bundle_is_not_calibrated_onto_itself(command, bundle_folder):
    code, _, err = command("calibrate", bundle_folder, "--data", "digits", "--out", bundle_folder, "--overwrite")
    assert code == 2
    assert "is the bundle that is read" in err


def test_rules_are_fitted_again_with_their_promises(newer):
    splits = cuq.Splits(
        train=drifted(200, 0, 1.0), calibration=drifted(300, 1, 1.0), decision=drifted(400, 4, 1.0),
        test=drifted(200, 2, 1.0),
    )  # fmt: skip
    torch.manual_seed(0)
    dense = cuq.finetune(Leaves(4), splits, epochs=15, lr=0.05).model
    first = cuq.compress(dense, splits, sparsity=0.5, uq="msp", epochs=4, lr=0.02, risk=0.3, coverage=0.9)
    assert first.model.acceptance is not None
    again = cuq.recalibrate(first, replace(newer, decision=drifted(400, 7)))
    assert again.model.acceptance is not None
    assert again.model.sets is not None
    assert again.model.record["acceptance"]["risk"] == 0.3
    assert again.model.record["sets"]["coverage"] == 0.9
    assert again.recipe["answers"]["acceptance"]["risk"] == 0.3
    assert not torch.equal(again.model.acceptance.threshold, first.model.acceptance.threshold)
    assert again.report.to_json()["compressed"]["decisions"]["set_coverage"]["value"] > 0.8
    # Too few images for a promise: the rule goes, and the card says why.
    few = cuq.recalibrate(first, cuq.Splits(calibration=drifted(12, 8), test=newer.test))
    assert few.model.acceptance is few.model.sets is None
    assert any("a decision rule of the old bundle is left out" in text for text in few.report.to_json()["warnings"])
