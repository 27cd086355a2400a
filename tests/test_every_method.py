"""One test over the registry: every uncertainty method from the command line to a bundle whose file answers as torch."""

import numpy as np
import pytest
import torch

import compress_uq as cuq
from compress_uq import pipeline
from compress_uq.report import card
from compress_uq.types import OUTPUT_NAMES
from compress_uq.uq import METHODS
from compress_uq_cli.main import main

ONE_PASS = {"msp", "laplace"}


@pytest.fixture(autouse=True, scope="module")
def _what_no_method_changes_is_done_once():
    """The card's page and many resamples have tests of their own; the dense model's file is always the same."""
    export, kept = pipeline._export_dense, []

    def once(plain, files):
        if kept:
            files["dense"].write_bytes(kept[0])
            return []
        said = export(plain, files)
        kept.append(files["dense"].read_bytes())
        return said

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuq.metrics.bootstrap, "RESAMPLES", 5)
        patch.setattr(card, "render_page", lambda *a, **k: "<html></html>")
        patch.setattr(pipeline, "_export_dense", once)
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Two narrow layers with batch norm, one epoch on digits."""
    out = tmp_path_factory.mktemp("tiny") / "m.pt"
    options = "--arch-option widths=16,16 --arch-option batch_norm=1 --epochs 1 --lr 0.02"
    assert main(f"train --arch compress-uq:mlp --data digits {options} --out {out}".split()) == 0
    return out


@pytest.mark.parametrize("name", METHODS.names)
def test_every_method_runs_from_the_command_line(name, command, tiny, tmp_path):
    code, _, err = command(
        "prune", tiny, "--sparsity", 0.5, "--uq", name, "--samples", 2, "--sampling-budget", 3, "--epochs", 1,
        "--ood", "synthetic", "--out", "b",
    )  # fmt: skip
    assert code == 0, err
    code, _, err = command("verify", "b")
    assert code == 0, err
    bundle = cuq.Bundle.load(tmp_path / "b")
    assert bundle.recipe["uncertainty"]["method"] == name
    images = torch.randn(6, 1, 8, 8)
    with torch.no_grad():
        ours = bundle.model(images)
    theirs = cuq.OnnxPredictor(tmp_path / "b" / "model.onnx")(images.numpy())
    assert np.array_equal(ours.label.numpy(), theirs.label)
    for output in OUTPUT_NAMES:
        assert getattr(theirs, output) == pytest.approx(getattr(ours, output).numpy(), abs=1e-4), output
    assert (ours.mutual_information.max() > 1e-6) == (name not in ONE_PASS)
