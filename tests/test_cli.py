"""The command line: what it does, what it prints where, and how it ends on every likely wrong input."""

import csv
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import compress_uq as cuq
import compress_uq_cli.main as cli
from small_models import OneLogit, TupleOutput, own

USER_CODE = """
import torch
import compress_uq as cuq
from torch import nn
from torch.utils.data import TensorDataset

def net(num_classes=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, num_classes))

def narrow():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4))

def rectified(num_classes=4):
    return nn.Sequential(*net(num_classes), nn.ReLU())

def frozen(num_classes=4):
    return net(num_classes).requires_grad_(False)

def make(n, seed, spoil=None, shape=(1, 8, 8), classes=4):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, generator=g); y = torch.arange(n) % classes
    if spoil: spoil(x, y)
    return TensorDataset(x, y)

def splits(spoil=None, **kw):
    return cuq.Splits(train=make(40, 0, spoil, **kw), calibration=make(20, 1, **kw), test=make(30, 2, spoil, **kw))

def nan_images(): return splits(lambda x, y: x[0].fill_(float("nan")))
def wrong_label(): return splits(lambda x, y: y[5:6].fill_(9))
def other_channels(): return splits(shape=(3, 8, 8))
def no_train(): return cuq.Splits(calibration=make(20, 1), test=make(30, 2))
def no_test(): return cuq.Splits(train=make(40, 0), calibration=make(20, 1))
def empty(): return cuq.Splits(train=torch.utils.data.Subset(make(4, 0), []))
def shared():
    base = make(40, 0)
    part = torch.utils.data.Subset
    return cuq.Splits(train=part(base, range(30)), calibration=part(base, range(25, 40)))
"""


@pytest.fixture
def user_code(tmp_path, command):
    (tmp_path / "user_code.py").write_text(USER_CODE)
    torch.save(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)).state_dict(), tmp_path / "m.pt"
    )
    return command


def one_line(err: str) -> str:
    lines = [line for line in err.splitlines() if line.startswith("compress-uq:")]
    assert len(lines) == 1
    assert "Traceback" not in err
    return lines[0]


def test_help_is_quick_and_lists_the_commands():
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "compress_uq_cli", "--help"], capture_output=True, text=True, check=True
    )
    assert time.perf_counter() - start < 10, "not a benchmark: torch alone would take longer on a slow machine"
    for name in ("prune", "train", "evaluate", "calibrate", "export", "verify", "predict", "methods", "study", "demo"):
        assert name in done.stdout


def test_main_job_leaves_a_bundle(bundle_folder):
    report = json.loads((bundle_folder / "report.json").read_text())
    assert report["recipe"]["pruning"]["sparsity"] == 0.5
    assert report["recipe"]["data"]["name"] == "digits"
    assert report["recipe"]["architecture"]["reference"] == "compress-uq:cnn"
    assert "held out" in report["recipe"]["data"]["calibration"]
    assert set(report["onnx"]["ood"]) == {"photographs", "shuffled-pixels"}
    assert report["onnx"]["metrics"]["accuracy"]["value"] > 0.5


def test_json_goes_to_stdout_and_tables_to_stderr(command, checkpoint, tmp_path):
    code, out, err = command("prune", checkpoint, "--sparsity", 0.5, "--uq", "msp", "--epochs", 1, "--json")
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "model-compressed" / "report.json").read_text())
    assert "Report card" in err
    assert "Plan" in err
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model-compressed"]


def test_options_that_change_nothing_are_named(command, checkpoint):
    given = ("--sparsity", 0.5, "--uq", "msp", "--risk-delta", 0.1, "--sets", "raps", "--validation-ood", "synthetic")
    code, _, err = command("prune", checkpoint, *given, "--dry-run")
    assert code == 0
    for option, other in (("risk-delta", "risk"), ("sets", "coverage"), ("validation-ood", "ood-score auto")):
        assert f"note: --{option} has no use without --{other}" in err


def test_a_dry_run_shows_the_plan_and_writes_nothing(command, checkpoint, tmp_path):
    code, out, err = command("prune", checkpoint, "--sparsity", 0.5, "--dry-run")
    assert (code, out) == (0, "")
    assert "dropout after" in err
    for row in (
        r"cost of a prediction +\S* *[\d,]+ MACs, 0\.\d\d of",
        r"memory +\S* *[\d,]+ bytes",
        r"networks trained +\S* *1 ",
    ):
        assert re.search(row, err), row
    assert not list(tmp_path.iterdir())


def test_requirements_decide_the_exit_code_and_the_bundle_is_kept(command, checkpoint, tmp_path):
    line = ["prune", checkpoint, "--sparsity", 0.5, "--uq", "msp", "--epochs", 0]
    code, _, err = command(*line, "--require", "accuracy>=1.1", "--require", "ece<=1")
    assert code == 1
    assert "accuracy is" in one_line(err)
    assert (tmp_path / "model-compressed" / "manifest.json").is_file()
    assert command(*line, "--require", "ece<=1", "--overwrite")[0] == 0


def test_config_lies_between_the_command_line_and_the_checkpoint(command, checkpoint, tmp_path):
    (tmp_path / "c.toml").write_text('sparsity = 0.25\nuq = "msp"\nepochs = 0\nood = ["synthetic"]\nround-to = 4\n')
    code, out, _ = command("prune", checkpoint, "--config", "c.toml", "--sparsity", 0.5, "--json")
    assert code == 0
    report = json.loads(out)
    assert report["recipe"]["pruning"]["sparsity"] == 0.5
    assert report["recipe"]["pruning"]["round_to"] == 4
    assert list(report["onnx"]["ood"]) == ["synthetic"]
    (tmp_path / "c.toml").write_text("sparsty = 0.25\n")
    code, _, err = command("prune", checkpoint, "--config", "c.toml")
    assert code == 2
    assert "did you mean 'sparsity'" in one_line(err)


def test_resume_keeps_state_only_while_it_is_needed(command, checkpoint, tmp_path, monkeypatch):
    import compress_uq.pipeline as pipeline

    line = ["prune", checkpoint, "--sparsity", 0.5, "--epochs", 2, "--samples", 4, "--resume"]
    real = pipeline.export_onnx

    def interrupted(*a, **k):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "export_onnx", interrupted)
    code, _, err = command(*line)
    assert code == 130
    assert "interrupted" in one_line(err)
    assert [f.name for f in tmp_path.iterdir()] == [".model-compressed.training"]
    monkeypatch.setattr(pipeline, "export_onnx", real)
    steps = []
    fit = cuq.steps.fit_network

    def watch(*a, progress, **k):
        return fit(*a, progress=steps.append, **k)

    monkeypatch.setattr(cuq.steps, "fit_network", watch)
    assert command(*line)[0] == 0
    assert steps == [], "the finished training was taken up, not repeated"
    assert [f.name for f in tmp_path.iterdir()] == ["model-compressed"]


def test_evaluate_takes_all_three_kinds(command, checkpoint, bundle_folder):
    values = {}
    for artifact in (checkpoint, bundle_folder, bundle_folder / "model.onnx"):
        code, out, err = command("evaluate", artifact, "--json")
        assert code == 0, err
        values[artifact] = json.loads(out)["metrics"]["accuracy"]["value"]
    report = json.loads((bundle_folder / "report.json").read_text())
    assert (
        values[bundle_folder] == values[bundle_folder / "model.onnx"] == report["onnx"]["metrics"]["accuracy"]["value"]
    )
    assert values[checkpoint] == report["dense"]["metrics"]["accuracy"]["value"]


def test_export_verify_and_predict(command, bundle_folder, tmp_path):
    for sampling in ("fixed", "seeded", "random"):
        code, out, _ = command("export", bundle_folder, "--out", f"{sampling}.onnx", "--sampling", sampling, "--json")
        assert code == 0
        assert json.loads(out)["size_bytes"] > 0
        code, _, err = command("verify", f"{sampling}.onnx")
        assert code == 0, err
    code, out, err = command("verify", bundle_folder, "--json")
    assert code == 0
    assert json.loads(out)["parity"]["found"].startswith("largest difference")
    from sklearn.datasets import load_digits

    for i, pixels in enumerate(load_digits().images[:3]):
        Image.fromarray((pixels * 255 / 16).round().astype(np.uint8)).save(tmp_path / f"{i}.png")
    for artifact in (bundle_folder, "seeded.onnx"):
        code, out, err = command("predict", artifact, "0.png", "1.png", "2.png", "--json")
        assert code == 0, err
        answers = json.loads(out)
        assert [a["file"] for a in answers] == ["0.png", "1.png", "2.png"]
        assert sum(a["label"] == str(i) for i, a in enumerate(answers)) >= 2
    code, _, err = command("export", bundle_folder, "--out", "fixed.onnx")
    assert code == 2
    assert "--overwrite" in one_line(err)


def test_predict_takes_folders_and_writes_csv(command, bundle_folder, tmp_path):
    random = np.random.default_rng(0)
    for number in range(40):  # more than are read together
        file = tmp_path / "images" / f"part{number % 2}" / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8)).astype(np.uint8)).save(file)
    Image.fromarray(np.zeros((12, 9, 3), np.uint8)).save(tmp_path / "one.jpg")
    code, out, err = command("predict", bundle_folder, "one.jpg", "images", "--csv")
    assert code == 0, err
    rows = list(csv.DictReader(io.StringIO(out)))
    files = sorted(f"images/part{n % 2}/{n:02}.png" for n in range(40))
    assert [row["file"] for row in rows] == ["one.jpg", *files]
    told = json.loads(command("predict", bundle_folder, "one.jpg", "images", "--json")[1])
    assert [{name: str(value) for name, value in answer.items()} for answer in told] == rows
    (tmp_path / "empty").mkdir()
    for wrong, message in ((["empty"], "holds no images"), (["one.jpg", "--csv", "--json"], "choose one")):
        code, out, err = command("predict", bundle_folder, *wrong)
        assert (code, out) == (2, "")
        assert message in one_line(err)


def test_verify_says_what_does_not_hold(command, bundle_folder, tmp_path):
    shutil.copytree(bundle_folder, tmp_path / "b")
    content = bytearray((tmp_path / "b" / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "b" / "model.onnx").write_bytes(content)
    for name in ("verify", "evaluate"):
        code, _, err = command(name, "b")
        assert code == 2
        assert "model.onnx does not match its hash" in one_line(err)


def test_train_and_evaluate_a_state_dict(command, tmp_path):
    code, out, _ = command(
        "train", "--arch", "compress-uq:mlp", "--arch-option", "widths=32,16", "--data", "digits", "--epochs", 2,
        "--optimizer", "adam", "--lr", 0.01, "--out", "m.pt", "--json",
    )  # fmt: skip
    assert code == 0
    accuracy = json.loads(out)["accuracy"]
    model = cuq.load_model(tmp_path / "m.pt")
    assert [tuple(p.shape) for p in model.parameters() if p.ndim == 2] == [(32, 64), (16, 32), (10, 16)]
    torch.save(model.state_dict(), tmp_path / "s.pt")
    line = ["evaluate", "s.pt", "--arch", "compress-uq:mlp", "--arch-option", "widths=32,16", "--data", "digits"]
    code, out, _ = command(*line, "--mean", "0.305", "--std", "0.376", "--json")
    assert json.loads(out)["metrics"]["accuracy"]["value"] == pytest.approx(accuracy)
    assert command("prune", "m.pt", "--sparsity", 0.5, "--epochs", 1, "--sampling-budget", 3)[0] == 0


def test_a_callers_own_model_and_data(user_code, tmp_path):
    line = ["prune", "m.pt", "--arch", "user_code:net", "--data", "user_code:splits", "--sparsity", 0.5, "--epochs", 1]
    code, _, err = user_code(*line, "--sampling-budget", 2)
    assert code == 0, err
    assert "no architecture" not in err
    code, _, err = user_code("export", "m-compressed", "--out", "x.onnx")
    assert code == 2
    assert "--arch" in one_line(err)
    assert user_code("export", "m-compressed", "--out", "x.onnx", "--arch", "user_code:net")[0] == 0
    code, _, err = user_code("evaluate", "m-compressed")
    assert code == 2
    assert "pass --data user_code:splits" in one_line(err)


def test_methods(command):
    code, out, _ = command("methods", "--json")
    listed = json.loads(out)
    assert code == 0
    assert {"criteria", "uq", "calibrators", "metrics", "exporters", "architectures", "datasets"} <= set(listed)
    assert all(set(entry) == {"name", "summary", "source"} for entries in listed.values() for entry in entries)
    assert command("methods")[0] == 0


PRUNE = ["prune", "m.pt", "--arch", "user_code:net", "--data", "user_code:splits"]
DRY = ["prune", "m.pt", "--sparsity", "0.5", "--dry-run", "--arch", "user_code:net", "--data", "user_code:splits"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "missing.pt", "--sparsity", "0.5"], "missing.pt: no such file"),
        (["prune", "pickle.pt", "--sparsity", "0.5", "--data", "digits"], "--unsafe-load"),
        (["prune", "m.pt", "--sparsity", "0.5", "--data", "digits"], "pass --arch"),
        (["prune", "m.pt", "--sparsity", "0.5"], "pass --data"),
        (["prune", "m.pt", "--sparsity", "0.5", "--arch", "compress-uq:mlp", "--data", "digits"],
         "1.weight is (32, 64) in the file and (128, 64) in the model"),
        ([*PRUNE, "--sparsity", "0.5", "--criterion", "l11"], "unknown criterion 'l11': did you mean 'l1'"),
        ([*PRUNE, "--sparsity", "0.5", "--uq", "mcdropout"], "did you mean 'mc-dropout'"),
        ([*PRUNE, "--sparsity", "0.5", "--calibration", "temprature"], "did you mean 'temperature'"),
        ([*PRUNE, "--sparsity", "0.5", "--augment", "flop", "--sampling-budget", "3"], "did you mean 'flip'"),
        (["prune", "m.pt", "--arch", "user_code:net", "--data", "cifar-10", "--sparsity", "0.5"], "did you mean 'cifar10'"),
        ([*PRUNE, "--sparsity", "0"], "sparsity=0.0"),
        ([*PRUNE, "--sparsity", "1"], "sparsity=1.0"),
        ([*PRUNE, "--sparsity", "-0.2"], "sparsity=-0.2"),
        ([*PRUNE, "--sparsity", "nan"], "sparsity=nan"),
        ([*PRUNE, "--sparsity", "much"], "much"),
        ([*PRUNE], "--sparsity"),
        ([*PRUNE, "--sparsity", "0.5", "--sparsty", "0.5"], "--sparsty"),
        ([*PRUNE, "--sparsity", "0.5", "--samples", "0"], "samples=0"),
        ([*PRUNE, "--sparsity", "0.5", "--dropout", "1"], "p=1.0"),
        ([*PRUNE, "--sparsity", "0.5", "--dropout-at", "conv9"], "conv9"),
        ([*PRUNE, "--sparsity", "0.5", "--epochs", "-1"], "epochs=-1"),
        ([*PRUNE, "--sparsity", "0.5", "--device", "cuda:77", "--sampling-budget", "3"], "cuda:77"),
        ([*PRUNE, "--sparsity", "0.5", "--require", "ece=3"], "ece=3"),
        ([*PRUNE, "--sparsity", "0.5", "--mean", "a,b"], "--mean 'a,b'"),
        ([*PRUNE, "--sparsity", "0.5", "--config", "none.toml"], "none.toml"),
        ([*PRUNE, "--sparsity", "0.5", "--out", "there"], "there exists: pass --overwrite"),
        ([*PRUNE, "--sparsity", "0.5", "--out", "mine", "--overwrite"], "not a bundle"),
        ([*PRUNE, "--sparsity", "0.5", "--sampling-budget", "0.1"], "--sampling-budget"),
        ([*PRUNE[:4], "--data", "user_code:other_channels", "--sparsity", "0.5"], "shape (3, 8, 8)"),
        ([*PRUNE[:4], "--data", "user_code:nan_images", "--sparsity", "0.5", "--sampling-budget", "3"], "NaN"),
        ([*PRUNE[:4], "--data", "user_code:wrong_label", "--sparsity", "0.5", "--sampling-budget", "3"], "label 9 is out of range"),
        ([*PRUNE[:4], "--data", "user_code:no_test", "--sparsity", "0.5"], "'test'"),
        ([*PRUNE[:4], "--data", "user_code:empty", "--sparsity", "0.5"], "'train' is empty"),
        ([*PRUNE[:4], "--data", "user_code:shared", "--sparsity", "0.5"], "index 25 is in the splits"),
        ([*PRUNE[:4], "--data", "user_code:gone", "--sparsity", "0.5"], "user_code:gone"),
        ([*DRY[:-4], "--data", "user_code:splits", "--arch", "user_code:rectified", "--uq", "laplace"], "followed by something"),
        ([*DRY[:-1], "user_code:no_train", "--uq", "laplace", "--epochs", "0"], "laplace needs the split 'train'"),
        ([*DRY, "--uq", "tradi", "--uq-option", "start=zero", "--uq-option", "observation-noise=10"], "their start at 0"),
        ([*DRY, "--uq", "mask-ensemble", "--sampling-budget", "3", "--epochs", "0"], "no epoch is left"),
        (["prune", "narrow.pt", "--arch", "user_code:narrow", "--data", "user_code:splits", "--sparsity", "0.5"],
         "nothing can be pruned"),
        (["prune", "m.pt", "--arch", "user_code:frozen", "--data", "user_code:splits", "--sparsity", "0.5"], "frozen"),
        (["prune", "tuple.pt", "--unsafe-load", "--data", "user_code:splits", "--sparsity", "0.5"], "tuple"),
        (["prune", "one.pt", "--unsafe-load", "--data", "user_code:splits", "--sparsity", "0.5"], "two-logit"),
        (["prune", "nan.pt", "--arch", "user_code:net", "--data", "user_code:splits", "--sparsity", "0.5"], "1.weight holds NaN"),
        (["train", "--arch", "compress-uq:cnn", "--data", "digits", "--out", "m.pt"], "--overwrite"),
        (["train", "--arch", "compress-uq:cnn", "--data", "digits", "--out", "no/m.pt"], "folder no is not there"),
        (["train", "--arch", "compress-uq:cmn", "--data", "digits", "--out", "n.pt"], "did you mean 'cnn'"),
        (["train", "--arch", "compress-uq:mlp", "--arch-option", "widths", "--data", "digits", "--out", "n.pt"], "KEY=VALUE"),
        (["evaluate", "nothing"], "nothing"),
        (["evaluate", "cut.onnx"], "cut.onnx"),
        (["export", "there", "--out", "x.onnx"], "not a bundle"),
        (["verify", "nothing"], "nothing: no such bundle or file"),
        (["predict", "cut.onnx", "a.png"], "cut.onnx"),
        (["prun"], "prun"),
    ],
)  # fmt: skip
def test_bad_input_ends_in_one_line_and_nothing_written(user_code, tmp_path, arguments, message):
    torch.save(own("mlp", (1, 8, 8)), tmp_path / "pickle.pt")
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).state_dict(), tmp_path / "narrow.pt")
    torch.save(TupleOutput(), tmp_path / "tuple.pt")
    torch.save(OneLogit(), tmp_path / "one.pt")
    state = torch.load(tmp_path / "m.pt")
    state["1.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    (tmp_path / "there").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "cut.onnx").write_bytes(b"\x08\x0a")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if "__pycache__" not in str(p)}
    code, out, err = user_code(*arguments)
    assert code == 2, err
    assert out == ""
    assert message in one_line(err)
    after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if "__pycache__" not in str(p)}
    assert after == before


def test_a_predictor_input_that_does_not_fit(command, bundle_folder, tmp_path):
    (tmp_path / "a.png").write_text("not an image")
    code, _, err = command("predict", bundle_folder, "a.png")
    assert code == 2
    assert "a.png is not an image" in one_line(err)


def test_a_fault_of_ours_shows_its_traceback(command, monkeypatch):
    def broken():
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(cuq, "catalogue", broken)
    code, _, err = command("methods")
    assert code == 3
    assert "ZeroDivisionError" in err


def test_ctrl_c_leaves_nothing(command, checkpoint, tmp_path, monkeypatch):
    def interrupt(*a, **k):
        raise KeyboardInterrupt

    monkeypatch.setattr(cuq.steps, "fit_network", interrupt)
    code, _, err = command("prune", checkpoint, "--sparsity", 0.5)
    assert code == 130
    assert one_line(err)
    assert not list(tmp_path.iterdir())


def test_ctrl_c_from_outside(checkpoint, tmp_path):
    """A real signal to a real process in the middle of its training."""
    line = [sys.executable, "-m", "compress_uq_cli", "prune", str(checkpoint), "--sparsity", "0.5", "--epochs", "5000"]
    # A test run started in the background ignores the signal, and its children would too.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(line, cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=heed) as process:
        for text in process.stderr:
            if text.startswith("fine-tuning"):
                break
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
        assert process.wait(60) == 130
    assert "interrupted" in err
    assert not list(tmp_path.iterdir())


def test_the_version(command):
    code, out, _ = command("--version")
    assert (code, out.strip()) == (0, cuq.__version__)


def test_demo_runs_the_line_and_replaces_its_own_output(command, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(cli, "app", lambda args, **k: lines.append(" ".join(args)))
    (tmp_path / "model-compressed").mkdir()
    (tmp_path / "model-compressed" / "manifest.json").write_text("{}")
    import compress_uq_cli.demo as demo

    demo.demo()
    assert lines[1] == "prune model.pt --sparsity 0.6 --uq mc-dropout"
    assert not (tmp_path / "model-compressed").exists()
