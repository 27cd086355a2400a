"""The bundle, the report card and the whole line from Python."""

import errno
import html.parser
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import compress_uq as cuq
from compress_uq.bundle import FILES
from compress_uq.errors import ArtifactError, DataError, InputError, ModelError
from compress_uq.metrics import Figure
from compress_uq.report import Requirement
from small_models import Leaves


def toy_splits(count=120, seed=0, classes=4, shape=(3, 32, 32)):
    """Four classes told apart by the brightness of a quarter, with noise that makes mistakes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    images = torch.randn(count, *shape, generator=generator)
    for i, label in enumerate(labels.tolist()):
        images[i, :, (label // 2) * 16 :, (label % 2) * 16 :] += 0.15
    return TensorDataset(images, labels)


@pytest.fixture(scope="module")
def callers_splits():
    return cuq.Splits(
        train=toy_splits(160, 0),
        calibration=toy_splits(80, 1),
        test=toy_splits(100, 2),
        ood={"noise": toy_splits(50, 3)},
    )


@pytest.fixture(scope="module")
def trained(callers_splits):
    return cuq.finetune(Leaves(4), callers_splits, epochs=3, lr=0.02).model


@pytest.fixture(scope="module")
def bundle(trained, callers_splits):
    return cuq.compress(
        trained, callers_splits, sparsity=0.5, uq=cuq.uq.MCDropout(p=0.2, samples=6), epochs=2, control=True
    )


def test_a_card_has_every_column_and_figure(bundle):
    report = json.loads(json.dumps(bundle.report.to_json(), allow_nan=False))
    assert set(report) == {
        "format_version", "dense", "dense_calibrated", "compressed", "onnx", "control", "fidelity", "calibration",
        "class_changes", "recipe", "conventions", "warnings",
    }  # fmt: skip
    names = "accuracy nll brier ece ause ause_exact aurc error_auroc accuracy_at_50 f1_macro ood_auroc".split()
    for column in ("dense", "dense_calibrated", "compressed", "onnx", "control"):
        m = report[column]
        assert list(m["metrics"]) == names
        assert set(m["ood"]["noise"]) == {"auroc", "aupr", "fpr95"}
        assert set(m["per_class"]) == {"0", "1", "2", "3"}
        assert set(m["cost"]) == {"parameters", "macs", "size_bytes", "latency_ms", "training_seconds"}
        for figure in [*m["metrics"].values(), *m["ood"]["noise"].values(), *m["per_class"].values()]:
            assert figure["low"] <= figure["value"] <= figure["high"]
    assert report["compressed"]["cost"]["parameters"] < report["dense"]["cost"]["parameters"]
    assert report["compressed"]["cost"]["macs"] < report["dense"]["cost"]["macs"]
    assert set(report["onnx"]["cost"]["latency_ms"]) == {"onnxruntime_1", "onnxruntime_32"}
    assert report["control"]["cost"]["parameters"] == report["dense"]["cost"]["parameters"]


def test_the_exported_file_is_measured_and_agrees(bundle):
    report = bundle.report.to_json()
    for name, figure in report["compressed"]["metrics"].items():
        assert report["onnx"]["metrics"][name]["value"] == pytest.approx(figure["value"], abs=0.02), name
    assert bundle.card.onnx is not bundle.card.compressed
    assert np.allclose(
        bundle.card.onnx.prediction.probabilities, bundle.card.compressed.prediction.probabilities, atol=1e-5
    )


def test_dense_is_as_it_was_given(bundle, trained, callers_splits):
    alone = cuq.evaluate(trained, callers_splits)
    assert bundle.card.dense.metrics == alone.metrics
    with torch.no_grad():
        wanted = torch.softmax(trained(callers_splits.test.tensors[0]), 1)
    assert np.allclose(bundle.card.dense.prediction.probabilities, wanted, atol=1e-5)


def test_calibration_lowers_the_nll_it_was_fitted_on(bundle, callers_splits):
    onto = cuq.Splits(test=callers_splits.calibration)
    model = bundle.model
    plain = cuq.calibrate(model, callers_splits, method="none")
    assert cuq.evaluate(model, onto).metrics["nll"].value <= cuq.evaluate(plain, onto).metrics["nll"].value


def test_round_trip_without_an_architecture(bundle, trained, tmp_path):
    folder = bundle.save(tmp_path / "b")
    assert sorted(f.name for f in folder.iterdir()) == sorted([*FILES, "manifest.json"])
    bare = cuq.Bundle.load(folder)
    with pytest.raises(ArtifactError, match="model=DENSE_MODULE"):
        bare.model  # noqa: B018
    assert bare.report.to_json() == bundle.report.to_json()
    assert "gates" not in cuq.verify(folder).checks
    back = cuq.Bundle.load(folder, model=lambda: Leaves(4))
    x = torch.randn(3, 3, 32, 32)
    for ours, theirs in zip(bundle.model(x)[:8], back.model(x)[:8], strict=True):
        assert torch.equal(ours, theirs)
    assert cuq.verify(folder, model=trained).checks["parity"].found.startswith("largest")
    with pytest.raises(ArtifactError, match="not the architecture"):
        cuq.Bundle.load(folder, model=torch.nn.Linear(2, 2))
    result = back.export_onnx(tmp_path / "again.onnx")
    assert np.allclose(
        cuq.OnnxPredictor(result.path)(x.numpy()).probabilities, back.model(x).probabilities.numpy(), atol=1e-5
    )


def test_a_fresh_process_gives_the_same_bits(bundle_folder):
    code = (
        "import compress_uq as cuq, torch, sys;"
        f"m = cuq.Bundle.load({str(bundle_folder)!r}).model;"
        "torch.set_num_threads(1); print(m(torch.ones(2, 1, 8, 8)).probabilities.double().sum(0).tolist())"
    )
    runs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(runs) == 1
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    here = cuq.Bundle.load(bundle_folder).model(torch.ones(2, 1, 8, 8)).probabilities.double().sum(0).tolist()
    torch.set_num_threads(threads)
    assert json.loads(runs.pop()) == here


def test_no_file_holds_a_path_or_a_pickle(bundle_folder):
    for file in bundle_folder.iterdir():
        content = file.read_bytes()
        for leak in (str(bundle_folder.parent), os.path.expanduser("~") + "/", "site-packages", os.getcwd()):
            assert leak.encode() not in content, (file.name, leak)
        assert not content.startswith((b"\x80\x02", b"PK"))


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_changed_file_is_refused_by_name(bundle_folder, tmp_path, name):
    folder = tmp_path / "b"
    shutil.copytree(bundle_folder, folder)
    content = bytearray((folder / name).read_bytes())
    place = content.find(b'"sparsity": 0.5') + 13 if name == "manifest.json" else len(content) // 2
    content[place] ^= 1
    (folder / name).write_bytes(content)
    for check in (cuq.Bundle.load, cuq.verify):
        with pytest.raises(ArtifactError, match=name):
            check(folder)
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=name):
        cuq.Bundle.load(folder)


def test_an_existing_folder_is_kept(bundle, tmp_path):
    folder = tmp_path / "b"
    bundle.save(folder)
    with pytest.raises(ArtifactError, match="--overwrite"):
        bundle.save(folder)
    bundle.save(folder, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="not a bundle"):
        bundle.save(tmp_path / "mine", overwrite=True)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["b", "mine"]


def test_a_disk_that_fills_leaves_nothing(bundle, tmp_path, monkeypatch):
    from pathlib import Path

    real = Path.write_bytes

    def full(self, content):
        if self.name == "report.html":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ArtifactError, match=r"could not be written \(No space left on device\)"):
        bundle.save(tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_a_newer_format_asks_for_an_update(bundle_folder, tmp_path):
    shutil.copytree(bundle_folder, tmp_path / "b")
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    manifest["format_version"] = 99
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="update compress-uq"):
        cuq.Bundle.load(tmp_path / "b")
    with pytest.raises(ArtifactError, match="not a bundle"):
        cuq.Bundle.load(tmp_path)


class Checker(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.sources, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_self_contained(bundle):
    checker = Checker()
    checker.feed(bundle.report.to_html())
    assert checker.open == []
    assert len(checker.sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in checker.sources)
    text = " ".join(checker.text)
    assert "dense_calibrated" in text
    assert "AUSE" in text


def test_the_markdown_card(bundle):
    text = bundle.report.to_markdown()
    for part in ("| accuracy |", "| OOD AUROC noise |", "## Accuracy per class", "## Recipe", "control"):
        assert part in text


def test_the_caller_keeps_the_model(trained, callers_splits):
    before = {k: v.clone() for k, v in trained.state_dict().items()}
    trained.train()
    cuq.compress(trained, callers_splits, sparsity=0.5, uq="msp", epochs=0)
    assert trained.training
    assert all(torch.equal(v, before[k]) for k, v in trained.state_dict().items())
    assert not trained._forward_hooks
    trained.eval()


def test_msp_costs_one_pass_and_has_no_mutual_information(trained, callers_splits):
    bundle = cuq.compress(trained, callers_splits, sparsity=0.5, uq="msp", epochs=1, calibration="none")
    x = torch.randn(2, 3, 32, 32)
    assert bundle.model(x).mutual_information.tolist() == [0, 0]
    assert bundle.model.calibrator.name == "none"
    plan = cuq.plan_compression(trained, callers_splits, sparsity=0.5)
    assert bundle.report.to_json()["compressed"]["cost"]["macs"] == plan.pruned.after.macs


def test_missing_splits_are_named_before_any_work(trained, callers_splits):
    with pytest.raises(DataError, match="'calibration'"):
        cuq.compress(trained, cuq.Splits(train=callers_splits.train, test=callers_splits.test), sparsity=0.5)
    with pytest.raises(DataError, match="'test'"):
        cuq.compress(trained, cuq.Splits(train=callers_splits.train, calibration=callers_splits.test), sparsity=0.5)


def test_an_architecture_that_does_not_build_the_model_is_refused(trained, callers_splits):
    architecture = cuq.Architecture("compress-uq:cnn", 4, (3, 32, 32))
    with pytest.raises(ModelError, match="does not build the model given"):
        cuq.compress(trained, callers_splits, sparsity=0.5, arch=architecture, epochs=0)


def test_nan_weights_are_refused(trained, callers_splits):
    import copy

    broken = copy.deepcopy(trained)
    broken.fc1.weight.data[0, 0] = float("inf")
    with pytest.raises(ModelError, match="fc1.weight holds NaN or infinite"):
        cuq.compress(broken, callers_splits, sparsity=0.5)


def test_warnings_in_words(trained, callers_splits):
    torch.manual_seed(3)
    chance = cuq.compress(Leaves(4).eval(), callers_splits, sparsity=0.5, uq="msp", epochs=0)
    assert any("near chance" in w for w in chance.card.warnings)
    contaminated = cuq.Splits(train=callers_splits.train, calibration=toy_splits(300, 7), test=toy_splits(300, 8))
    easy = TensorDataset(contaminated.calibration.tensors[0], contaminated.calibration.tensors[1])
    with torch.no_grad():
        easy.tensors[1].copy_(trained(easy.tensors[0]).argmax(1))
    easy.tensors[1][:30] = (easy.tensors[1][:30] + 1) % 4
    suspicious = cuq.compress(
        trained, cuq.Splits(train=easy, calibration=easy_part(easy), test=contaminated.test), sparsity=0.1, uq="msp",
        epochs=0, round_to=1,
    )  # fmt: skip
    assert any("trained on calibration images" in w for w in suspicious.card.warnings)


def easy_part(dataset):
    return TensorDataset(dataset.tensors[0][:200].clone(), dataset.tensors[1][:200].clone())


@pytest.mark.parametrize(
    ("text", "value", "met"), [("ece<=0.03", 0.02, True), ("ece <= 0.01", 0.02, False), ("accuracy>=0.9", 0.95, True)]
)
def test_requirements(text, value, met):
    requirement = Requirement.parse(text)
    assert (requirement.failure(Figure(value, value, value)) is None) is met
    assert requirement.failure(None) is not None


@pytest.mark.parametrize("text", ["ece<0.03", "ece<=low", "<=3", "nothing>=1"])
def test_requirements_that_cannot_be_read(text):
    with pytest.raises(InputError):
        Requirement.parse(text)
