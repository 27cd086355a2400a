"""Models, images and answers that cannot be right: refused in a line before any training, or said in words on the card."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import compress_uq as cuq
from compress_uq import pipeline
from compress_uq.config import AnswerConfig
from compress_uq.errors import CalibrationError, DataError, GateError, ModelError, UncertaintyError
from compress_uq.finishing import finish_model
from compress_uq.report import suspicions
from compress_uq.stages import Origin
from compress_uq.uncertain import as_given

SHAPE = (1, 6, 6)


class Small(nn.Module):
    """A convolution with batch norm, which a caller may leave in train mode, and dropout as a function."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.Linear(16, 4)

    def forward(self, x):
        return self.fc(F.dropout(F.relu(self.norm(self.conv(x))), 0.1, self.training).mean((2, 3)))


class Unused(Small):
    def __init__(self):
        super().__init__()
        self.unused = nn.ReLU()


class Overflowing(Small):
    def forward(self, x):
        return super().forward(x / x.abs().sum((1, 2, 3), keepdim=True).sign())


def images(labels, seed):
    torch.manual_seed(seed)
    truth = torch.as_tensor(labels)
    return TensorDataset(torch.randn(len(truth), *SHAPE) + truth.reshape(-1, 1, 1, 1), truth)


@pytest.fixture
def splits():
    balanced = torch.arange(40) % 4
    return cuq.Splits(train=images(balanced, 0), calibration=images(balanced, 1), test=images(balanced, 2))


def nothing_runs(model, splits, **options):
    """All of `compress` that may still refuse."""
    return cuq.plan_compression(model, splits, **{"sparsity": 0.5, "uq": "msp", "epochs": 0, **options})


@pytest.mark.parametrize("calibration", ["temperature", "vector", "auto"])
def test_fewer_calibration_images_than_classes(splits, calibration):
    few = replace(splits, calibration=images([0, 1, 3], 1))
    with pytest.raises(CalibrationError, match="3 calibration images for 4 classes are too few"):
        nothing_runs(Small(), few, calibration=calibration)
    assert nothing_runs(Small(), few, calibration="none")


def test_a_class_without_calibration_images(splits):
    lacking = replace(splits, calibration=images(torch.arange(40) % 3, 1))
    for name in ("vector", "dirichlet"):
        with pytest.raises(CalibrationError, match=f"{name!r} needs images of every class.* none of class 3"):
            nothing_runs(Small(), lacking, calibration=name)
    for name in ("temperature", "auto"):
        assert nothing_runs(Small(), lacking, calibration=name)


def test_scores_that_one_member_cannot_give(splits):
    for name in ("mutual-information", "variance"):
        for which in ("score", "ood_score"):
            with pytest.raises(UncertaintyError, match=f"{name!r} compares members, and the model has one"):
                nothing_runs(Small(), splits, **{which: name})


def test_dropout_that_is_refused(splits):
    with pytest.raises(UncertaintyError, match="no place for dropout was found"):
        cuq.uq.MCDropout().plan(nn.Sequential(nn.Flatten(), nn.Linear(36, 4)), Origin(SHAPE))
    with pytest.raises(UncertaintyError, match="dropout cannot go at unused: it does not run exactly once"):
        nothing_runs(Unused(), splits, uq=cuq.uq.MCDropout(at="unused"))
    with pytest.raises(cuq.InputError, match="p=0"):
        cuq.uq.MCDropout(p=0.0)


@pytest.mark.parametrize(
    ("model", "uq", "options", "message"),
    [
        (nn.Sequential(Small(), nn.ReLU()), "laplace", {}, "0.fc is followed by something else"),
        (nn.Sequential(Small(), nn.LogSoftmax(1)), "laplace", {}, "0.fc is followed by something else"),
        (Small(), "laplace", {"without": "train", "epochs": 0}, "laplace needs the split 'train'"),
        (Small(), cuq.uq.Laplace("held-out"), {"without": "calibration", "calibration": "none"}, "'held-out' needs the"),
        (Small(), cuq.uq.TRADI(start="zero", observation_noise=10.0), {}, "hold 100% of their start at 0"),
        (Small(), cuq.uq.SWAG(), {"epochs": 1}, "swag has 1 step to take a snapshot of"),
        (Small(), "swag", {"epochs": 0}, "no epoch is left"),
        (Small(), "mask-ensemble", {"epochs": 0}, "no epoch is left"),
        (Small(), "msp", {"without": "train"}, "fine-tuning needs the split 'train'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [{"sparsity": 0.5}, {"budget": ["accuracy_drop<=0.5"]}])
def test_what_a_method_cannot_be_fitted_to_is_refused_before_a_training_step(splits, model, uq, options, message, size):
    given = {"epochs": 2, **options}
    splits, steps = replace(splits, **{given.pop("without"): None} if "without" in given else {}), []
    with pytest.raises(cuq.InputError, match=message):
        cuq.compress(model, splits, uq=uq, progress=steps.append, **size, **given)
    assert not steps


def test_what_the_plan_says_in_words(splits):
    same = splits.test.tensors[0].clone()
    same[:2] = splits.calibration.tensors[0][:2]
    doubled = replace(splits, test=TensorDataset(same, splits.test.tensors[1]))
    said = nothing_runs(Small(), doubled, uq=cuq.uq.MCDropout(samples=2, sampling_budget=9)).warnings
    assert any("dropout called as a function in forward is not a site" in text for text in said)
    assert any(text.startswith("2 identical images are in both parts of") for text in said)


def test_a_class_missing_from_test_a_one_class_ood_set_and_a_model_in_train_mode(splits, monkeypatch):
    real = pipeline.export_onnx

    def refused(model, path, **options):
        if path.name == "dense.onnx":
            raise GateError("gate 'operators': no")
        return real(model, path, **options)

    monkeypatch.setattr(pipeline, "export_onnx", refused)
    torch.manual_seed(0)
    model = Small().train()
    lacking = replace(splits, test=images(torch.arange(30) % 3, 2), ood={"ones": images([0] * 12, 3)})
    bundle = cuq.compress(model, lacking, sparsity=0.5, uq="msp", epochs=0)
    assert model.norm.training
    report = json.loads(json.dumps(bundle.report.to_json(), allow_nan=False))
    assert report["dense"]["metrics"] == cuq.evaluate(model.eval(), lacking).to_json()["metrics"]
    assert list(report["compressed"]["per_class"].values())[3]["value"] is None
    assert 0 <= report["compressed"]["ood"]["ones"]["auroc"]["value"] <= 1
    assert "could not be timed in ONNX Runtime: gate 'operators'" in " ".join(report["warnings"])
    assert report["dense"]["cost"]["latency_ms"] == {}


def test_logits_that_are_not_finite(splits):
    blank = splits.test.tensors[0].clone()
    blank[3] = 0
    with pytest.raises(DataError, match="NaN or infinite values, first in row 3"):
        cuq.compress(
            Overflowing(), replace(splits, test=TensorDataset(blank, splits.test.tensors[1])), sparsity=0.5, uq="msp"
        )
    with pytest.raises(ModelError, match="'dark': the OOD score of 1 of .* images is NaN or infinite"):
        cuq.evaluate(Overflowing(), replace(splits, ood={"dark": TensorDataset(blank, splits.test.tensors[1])}))
    given = replace(splits, calibration=TensorDataset(blank, splits.calibration.tensors[1]))
    done = finish_model(
        as_given((Overflowing().eval(),), Origin(SHAPE)), given, AnswerConfig(ood_score="variance"), name="compressed"
    )
    assert done.model.calibrator.name == "none"
    uncalibrated, scores = done.warnings
    assert uncalibrated.startswith("compressed is not calibrated: the logits of 1 of 40 calibration images are NaN")
    assert scores.startswith("compressed keeps the scores confidence and entropy: score 'variance' compares members")


def answering(sure_when_wrong):
    """Images that are their own logits, sure where they are wrong or where they are right, and surer ones from afar."""
    sure = np.arange(60) % 2 == 0
    wrong = sure == sure_when_wrong
    label = np.arange(60) % 4
    logits = np.eye(4, dtype=np.float32)[(label + wrong) % 4] * np.where(sure, 5, 1)[:, None]
    far = np.eye(4, dtype=np.float32)[label] * 9
    near, foreign = (torch.from_numpy(v.astype(np.float32)).reshape(60, 4, 1, 1) for v in (logits, far))
    splits = cuq.Splits(
        test=TensorDataset(near, torch.from_numpy(label)), ood={"far": TensorDataset(foreign, torch.zeros(60))}
    )
    model = as_given((nn.Flatten(),), Origin((4, 1, 1)))
    return suspicions(model, splits, cuq.evaluate(model, splits))


def test_scores_that_rank_worse_than_chance_are_said():
    order, errors, ood = answering(sure_when_wrong=True)
    assert order.startswith("the uncertainty ranks errors worse than a random order: AUSE ")
    assert errors == "the uncertainty tells errors from right answers worse than chance: error_auroc 0.0000"
    assert ood == "the OOD score ranks far worse than chance, AUROC 0.0000: its images pass for in-distribution"
    assert answering(sure_when_wrong=False) == [ood]
