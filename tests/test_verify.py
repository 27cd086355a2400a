"""Checking an artifact again: what holds is said, and what does not is named with what was found and expected."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import compress_uq as cuq
from compress_uq.errors import ArtifactError, InputError, VerificationError
from compress_uq.export import GATES
from compress_uq.report import compare_column
from compress_uq.storage import sha256
from small_models import Leaves
from test_bundle import toy_splits


@pytest.fixture(scope="module")
def card(bundle_folder):
    return json.loads((bundle_folder / "report.json").read_text())


@pytest.fixture(scope="module")
def bundle(bundle_folder):
    return cuq.Bundle.load(bundle_folder)


@pytest.fixture(scope="module")
def digits(bundle_folder):
    """What the card was measured on."""
    file = cuq.OnnxPredictor(bundle_folder / "model.onnx")
    return cuq.load_recorded_data(file, ood=("photographs", "shuffled-pixels"))


def consistently(folder, target, changes):
    """A copy of a bundle with other files in it, and a manifest that vouches for them."""
    shutil.copytree(folder, target)
    manifest = json.loads((target / "manifest.json").read_text())
    for name, content in changes.items():
        (target / name).write_bytes(content)
        manifest["sha256"][name] = sha256(target / name)
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


def broken(error):
    return [name for name, check in error.value.checks.items() if check.held is False]


def test_a_bundle_holds_and_every_figure_of_its_card_was_compared(command, bundle_folder, card):
    code, out, err = command("verify", bundle_folder, "--data", "digits", "--json")
    assert code == 0, err
    checks = json.loads(out)
    figures = [*card["onnx"]["metrics"], *(f"{s} {k}" for s, kinds in card["onnx"]["ood"].items() for k in kinds)]
    own = ["hashes", "recipe", "size", "data", *GATES]
    assert list(checks) == [*own, *(f"card: {name}" for name in figures), "card: accuracy of each class"]
    assert all(check["held"] is True for check in checks.values())
    assert "expected" in checks["card: ece"]["found"]


def test_without_data_the_files_alone_are_checked_and_that_is_said(command, bundle_folder):
    code, out, err = command("verify", bundle_folder, "--json")
    assert code == 0
    assert json.loads(out)["card"] == {
        "found": "not compared: no data were given; --data (data=) measures it again", "held": None
    }  # fmt: skip
    assert "not measured again" in err


def test_a_card_that_claims_too_much_is_named_with_both_numbers(command, bundle_folder, card, tmp_path):
    told = json.loads(json.dumps(card))
    told["onnx"]["metrics"]["ece"]["value"] = 0.001
    told["onnx"]["ood"]["photographs"]["auroc"]["value"] = 0.99
    consistently(bundle_folder, tmp_path / "b", {"report.json": json.dumps(told).encode()})
    assert command("verify", "b")[0] == 0
    code, out, err = command("verify", "b", "--data", "digits", "--json")
    assert code == 2
    line = next(line for line in err.splitlines() if line.startswith("compress-uq:"))
    real = card["onnx"]["metrics"]["ece"]["value"]
    assert f"b: card: ece: {real:.7g}, expected 0.001, allowed" in line
    assert "card: photographs auroc" in line
    assert [name for name, check in json.loads(out).items() if check["held"] is False] == [
        "card: ece", "card: photographs auroc",
    ]  # fmt: skip


def test_a_file_that_another_model_gave_is_named(bundle_folder, bundle, digits, card, tmp_path):
    """Another temperature: labels and accuracy stay, confidences do not; hashes and size are forged."""
    sharper = bundle.model.but(calibrator=cuq.calibrate(bundle.model, digits_calibration(digits)).calibrator)
    with torch.no_grad():
        sharper.calibrator.log_temperature.sub_(0.5)
    file = cuq.export_onnx(sharper, tmp_path / "m.onnx", recipe_hash=cuq.OnnxPredictor(
        bundle_folder / "model.onnx").metadata["recipe_sha256"])  # fmt: skip
    told = json.loads(json.dumps(card))
    told["onnx"]["cost"]["size_bytes"] = file.size_bytes
    changed = {"model.onnx": file.path.read_bytes(), "report.json": json.dumps(told).encode()}
    folder = consistently(bundle_folder, tmp_path / "b", changed)
    with pytest.raises(VerificationError, match="gate 'parity'") as error:
        cuq.verify(folder, data=digits)
    assert broken(error) == ["parity"]
    # Where the model cannot be rebuilt, the card tells.
    bare = replace(cuq.Bundle.load(folder), uncertain=None)
    assert cuq.verify(bare).checks["parity"].held is None
    with pytest.raises(VerificationError, match="card: nll: .* expected") as error:
        cuq.verify(bare, data=digits)
    assert {"card: nll", "card: ece"} <= set(broken(error)) <= {f"card: {name}" for name in (
        "nll", "brier", "ece", "ause", "ause_exact", "aurc", "error_auroc", "accuracy_at_50", "ood_auroc",
        *(f"{s} {k}" for s in digits.ood for k in ("auroc", "aupr", "fpr95")))}  # fmt: skip
    assert "card: accuracy" not in broken(error)


def digits_calibration(splits):
    return cuq.Splits(calibration=splits.test)


def test_a_file_of_another_run_or_size_is_named(bundle, card):
    told = {**card, "onnx": {**card["onnx"], "cost": {**card["onnx"]["cost"], "size_bytes": 5}}}
    with pytest.raises(VerificationError, match="size: model.onnx has .* expected 5 ") as error:
        cuq.verify(replace(bundle, recipe={}, report_json=told))
    assert broken(error) == ["recipe", "size"]
    assert error.value.checks["recipe"].found.startswith("model.onnx is of recipe")


def test_other_data_than_the_cards_are_told_before_anything_is_measured(bundle, digits):
    fewer = replace(digits, test=torch.utils.data.Subset(digits.test, range(50)))
    with pytest.raises(VerificationError, match="data: 50 test images, expected 3") as error:
        cuq.verify(bundle, data=fewer)
    assert broken(error) == ["data"]
    assert error.value.checks["card"].held is None
    with pytest.raises(VerificationError, match="data: fingerprint other, expected"):
        cuq.verify(bundle, data=replace(digits, info=replace(digits.info, fingerprint="other")))
    with pytest.raises(InputError, match=r"\(3, 32, 32\)"):
        cuq.verify(bundle, data=cuq.Splits(test=toy_splits(360)))


def test_a_set_that_was_not_given_is_not_compared(bundle, digits):
    checks = cuq.verify(bundle, data=replace(digits, ood={"photographs": digits.ood["photographs"]})).checks
    assert checks["card: photographs auroc"].held is True
    assert checks["card: shuffled-pixels auroc"].held is checks["card: ood_auroc"].held is None


def test_a_lone_file_has_no_card(command, bundle_folder, digits):
    file = bundle_folder / "model.onnx"
    assert list(cuq.verify(file).checks) == list(GATES)
    with pytest.raises(InputError, match="no report card"):
        cuq.verify(file, data=digits)
    assert command("verify", file, "--data", "digits")[0] == 2


@pytest.mark.parametrize(("precision", "layout"), [("fp16", "float32-nchw"), ("int8", "uint8-nhwc")])
def test_a_bundle_in_another_precision(bundle, digits, splits, card, tmp_path, precision, layout):
    file = bundle.export_onnx(tmp_path / "m.onnx", precision=precision, input=layout, splits=splits)
    column = cuq.evaluate(file.path, digits).to_json()
    changed = replace(bundle, onnx=file.path.read_bytes(), report_json={**card, "onnx": column})
    checks = cuq.verify(changed, data=digits).checks
    assert all(checks[f"card: {name}"].held for name in column["metrics"])
    assert "8-bit integers" in checks["precision"].found or "in float16" in checks["precision"].found


def test_members_rules_and_scores_are_compared_too():
    splits = cuq.Splits(
        train=toy_splits(160, 0), calibration=toy_splits(200, 1), test=toy_splits(100, 2), ood={"n": toy_splits(50, 3)}
    )
    bundle = cuq.compress(
        [Leaves(4).eval(), Leaves(4).eval()], splits, sparsity=0.5, uq="ensemble", epochs=1, lr=0.02, risk=0.9,
        coverage=0.8, ood_score="energy",
    )  # fmt: skip
    checks = cuq.verify(bundle, data=splits).checks
    decided = {"acceptance_coverage", "selective_risk", "set_coverage", "set_size", "set_singletons", "set_empty"}
    assert all(checks[f"card: {name}"].held for name in decided)
    told = json.loads(json.dumps(bundle.report.to_json()))
    told["onnx"]["decisions"]["set_coverage"]["value"] -= 0.01  # one image
    with pytest.raises(VerificationError, match="card: set_coverage"):
        cuq.verify(replace(bundle, report_json=told), data=splits)


def evaluation(bundle_folder, digits):
    return cuq.evaluate(bundle_folder / "model.onnx", digits)


def other_answers(measured, **fields):
    prediction = measured.prediction._replace(**fields)
    figures = cuq.metrics.classification_metrics(prediction.probabilities, measured.labels, prediction.uncertainty)
    metrics = {name: cuq.metrics.Figure(v, v, v) for name, v in figures.items()}
    return replace(measured, prediction=prediction, metrics=metrics, ood={}, ood_scores={}, decisions={})


def test_tolerances(bundle_folder, digits):
    """Rounding passes; one answer more or less does not, unless its two classes were tied."""
    measured = evaluation(bundle_folder, replace(digits, ood={}))
    p, labels = measured.prediction.probabilities.astype(np.float64), measured.labels
    plain = other_answers(measured, probabilities=p, uncertainty=1 - p.max(1))
    noisy = p * (1 + 3e-6 * np.random.default_rng(5).normal(size=p.shape))
    noisy /= noisy.sum(1, keepdims=True)
    rounded = other_answers(measured, probabilities=noisy, uncertainty=1 - noisy.max(1)).to_json()

    def off(recorded, now, precision="fp32"):
        return [n for n, check in compare_column(recorded, now, precision).items() if check.held is False]

    assert off(rounded, plain) == []
    right = int(np.flatnonzero(p.argmax(1) == labels)[0])
    for gap, failing in ((2e-7, False), (1e-3, True)):
        tied = p.copy()
        tied[right] = 0
        first, second = labels[right], (labels[right] + 1) % 10
        tied[right, first], tied[right, second] = 0.5 + gap, 0.5 - gap
        turned = tied.copy()
        turned[right, [first, second]] = turned[right, [second, first]]
        one, other = (other_answers(measured, probabilities=q, uncertainty=1 - q.max(1)) for q in (tied, turned))
        assert ("card: accuracy" in off(other.to_json(), one)) is failing
    assert "card: ece" in off(other_answers(measured, probabilities=p ** 1.01 / (p ** 1.01).sum(1, keepdims=True),
                                      uncertainty=1 - p.max(1)).to_json(), plain)  # fmt: skip
    assert "card: error_auroc" in off(
        other_answers(measured, uncertainty=-(1 - p.max(1)), probabilities=p).to_json(), plain
    )


def test_a_changed_or_missing_file_ends_before_any_check(bundle_folder, tmp_path):
    shutil.copytree(bundle_folder, tmp_path / "b")
    (tmp_path / "b" / "model.onnx").write_bytes(b"other")
    with pytest.raises(ArtifactError, match="model.onnx does not match its hash"):
        cuq.verify(tmp_path / "b")
