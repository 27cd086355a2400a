"""Studies: every run once whatever interrupts it, figures as `compress` has them, tables, plots and the choice."""

import csv
import io
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib.axes
import numpy as np
import pytest
import torch
import typer.main

import compress_uq as cuq
import compress_uq.study.compress as compress_kind
from compress_uq.held_out import held_out_figures
from compress_uq.registry import Entry
from compress_uq.study.lock import held_or_not
from compress_uq.study.plots import draw
from compress_uq_cli.main import app

DIGITS = """
[defaults]
arch = "compress-uq:cnn"
arch-option = {widths = [16, 16]}
data = "digits"
ood = ["synthetic"]
epochs = 1
samples = 4
round-to = 2
sampling-budget = 3
dense = {epochs = 2, lr = 0.02, seed = 7}
[grid]
sparsity = [0.25, 0.5]
seed = [0, 1]
"""


@pytest.fixture(autouse=True, scope="module")
def _few_resamples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuq.metrics.bootstrap, "RESAMPLES", 5)
        yield


@pytest.fixture(scope="module")
def digits(tmp_path_factory, _few_resamples):
    """A study of a small CNN on digits; read only."""
    folder = tmp_path_factory.mktemp("digits")
    (folder / "ratio.toml").write_text(DIGITS)
    return folder / "ratio.toml", cuq.run_study(folder / "ratio.toml", folder / "out")


@dataclass(frozen=True)
class Numbers:
    a: object
    b: float
    seed: int


class FakeKind(cuq.study.Kind[Numbers]):
    """Runs that take no time, and count themselves."""

    shown = ("y", "cost")
    axis = "note"
    settings = frozenset({"a", "b", "seed", "note"})
    measures = frozenset({"y", "cost", "held_out_y", "dense_y"})
    without_bearing = frozenset({"note"})

    def __init__(self):
        self.done, self.before = [], lambda settings, context: None

    def read(self, values):
        if values.get("a") == "never":
            raise cuq.InputError("a = 'never': expected anything else")
        return Numbers(values.get("a", "x"), values.get("b", 0.0), values.get("seed", 0))

    def identity(self, settings):
        return vars(settings)

    def run(self, settings, context):
        self.before(settings, context)
        self.done.append((settings.a, settings.b, settings.seed))
        if settings.a == "refused":
            raise cuq.errors.PruningError("nothing was pruned:\nraise --sparsity")
        if settings.a == "fault":
            raise ZeroDivisionError("oops")
        y = settings.b + settings.seed
        measures = {"y": y, "held_out_y": 10 - y, "cost": 1000 * settings.b, "dense_y": 2.0}
        return cuq.study.Outcome(measures, ("a note",))

    def held_out(self, measure):
        return {"y": "held_out_y", "cost": "cost"}.get(measure)


@pytest.fixture
def fake(monkeypatch):
    kind = FakeKind()
    monkeypatch.setitem(cuq.study.KINDS._entries, "fake", Entry("fake", "none", "", kind))
    return kind


def write(folder, grid, more="", head=""):
    path = folder / "s.toml"
    path.write_text(f'[study]\nkind = "fake"\n{head}\n[grid]\n{grid}\n{more}')
    return path


def table(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


def one_line(err):
    (line,) = [line for line in err.splitlines() if line.startswith("compress-uq:")]
    return line


def test_each_run_leaves_its_record_and_the_dense_model_is_made_once(digits):
    _, result = digits
    records = [json.loads(path.read_text()) for path in sorted((result.folder / "runs").glob("*.json"))]
    assert [(r["settings"]["sparsity"], r["seed"]) for r in records] == [(0.25, 0), (0.25, 1), (0.5, 0), (0.5, 1)]
    assert len(list((result.folder / "shared").glob("*.pt"))) == 1
    shared = sorted(path.name.split("-")[0] for path in (result.folder / "shared").glob("*.json"))
    assert shared == ["dense", "dense_calibrated"]
    assert not any((result.folder / "work").iterdir())
    for record in records:
        found = record["result"]
        assert set(found) <= cuq.study.KINDS["compress"].measures
        assert {
            f"{prefix}{m}" for prefix in ("", "dense_", "dense_calibrated_") for m in cuq.metrics.METRICS.names
        } <= set(found)
        assert found["accuracy_drop"] == found["dense_accuracy"] - found["accuracy"]
        assert found["pass_macs_share"] < 1 < found["dense_macs"]
        assert found["worst_class_accuracy"] <= found["accuracy"]
        assert {"compress_uq", "torch", "python"} == set(record["versions"])
        assert record["seconds"] > 0
    assert {r["result"]["dense_accuracy"] for r in records} == {records[0]["result"]["dense_accuracy"]}
    shares = [r["result"]["parameters_share"] for r in records]
    assert shares[0] == shares[1] > shares[2] == shares[3]
    assert records[0]["result"]["nll"] != records[1]["result"]["nll"], "the seed has its say"


def test_a_run_finds_what_compress_finds(digits, monkeypatch):
    monkeypatch.setattr(cuq.pipeline, "onnx_milliseconds", lambda files, shape: {name: {} for name in files})
    _, result = digits
    run = result.runs[3]
    (file,) = (result.folder / "shared").glob("*.pt")
    opened = cuq.open_model_and_data(file, ood=["synthetic"])
    card = cuq.compress(
        opened.checkpoint.model, opened.splits, sparsity=0.5, round_to=2, epochs=1, seed=1,
        uq=cuq.uq.MCDropout(samples=4, sampling_budget=3, seed=1),
    ).card  # fmt: skip
    for prefix, column in (("", card.compressed), ("dense_", card.dense), ("dense_calibrated_", card.dense_calibrated)):
        for name, figure in column.metrics.items():
            assert run.measure(prefix + name) == pytest.approx(figure.value, abs=1e-9), prefix + name
    assert run.measure("macs") == card.compressed.cost.macs
    assert run.measure("parameters") == card.compressed.cost.parameters
    assert run.measure("sparsity_reached") == card.recipe["pruning"]["sparsity_reached"]


def test_the_dense_model_has_the_calibrator_that_auto_took(checkpoint, tmp_path, monkeypatch):
    chosen_for = []

    def choose(logits, labels, seed=0):
        chosen_for.append(logits.shape)
        return cuq.calibration.Choice("vector", {}, {}, {}, 5)

    monkeypatch.setattr(sys.modules["compress_uq.calibration.choice"], "choose", choose)
    file = tmp_path / "s.toml"
    settings = f'model = "{checkpoint}"\nuq = "msp"\nepochs = 0\ncalibration = "auto"'
    file.write_text(f"[defaults]\n{settings}\n[grid]\nsparsity = [0.5]\n")
    (run,) = cuq.run_study(file, tmp_path / "out").runs
    assert len(chosen_for) == 1, "once, for the compressed model"
    dense = cuq.read_checkpoint(checkpoint)
    splits = cuq.load_splits("digits", record=dense.data)
    vector = cuq.calibrate(cuq.fit_uncertainty(dense.model, splits, method="msp"), splits, method="vector")
    assert run.measure("dense_calibrated_nll") == pytest.approx(cuq.evaluate(vector, splits).metrics["nll"].value)


def test_finished_runs_are_never_repeated_and_a_changed_grid_adds_its_own(digits, tmp_path, monkeypatch):
    file, result = digits
    done = []

    def count(self, settings, context):
        done.append(settings)
        return cuq.study.Outcome({})

    monkeypatch.setattr(compress_kind.CompressKind, "run", count)
    assert not cuq.run_study(file, result.folder).to_do
    assert done == []
    text = DIGITS.replace("round-to = 2", 'round-to = 2\ncriterion = "l1"\nlr = 0.05\ndevice = "cpu"\nworkers = 0')
    changed = tmp_path / "changed.toml"
    changed.write_text(text.replace("[0.25, 0.5]", "[0.5, 0.75]"))
    plan = cuq.plan_study(changed, result.folder)
    assert [run.done for run in plan.runs] == [True, True, False, False], "spelled-out defaults change nothing"
    changed.write_text(text.replace("dense = {epochs = 2", "dense = {epochs = 3"))
    assert len(cuq.plan_study(changed, result.folder).to_do) == 4, "another dense model"


def test_another_model_under_the_same_name_is_another_run(checkpoint, tmp_path):
    (tmp_path / "s.toml").write_text(f'[defaults]\nmodel = "{tmp_path}/m.pt"\n[grid]\nsparsity = [0.5]\n')
    keys = []
    for content in (checkpoint.read_bytes(), checkpoint.read_bytes() + b" "):
        (tmp_path / "m.pt").write_bytes(content)
        keys.append(cuq.plan_study(tmp_path / "s.toml").runs[0].key)
    assert keys[0] != keys[1]


def test_tables_hold_means_and_deviations_of_the_records(digits):
    _, result = digits
    values = {s: [r.measure("ece") for r in result.runs if r.values["sparsity"] == s] for s in (0.25, 0.5)}
    lines = table(result.folder / "tables" / "all.csv")
    assert [float(line["sparsity"]) for line in lines] == [0.25, 0.5]
    for line in lines:
        pair = values[float(line["sparsity"])]
        assert float(line["ece_mean"]) == pytest.approx(sum(pair) / 2)
        assert float(line["ece_sd"]) == pytest.approx(abs(pair[0] - pair[1]) / 2**0.5)
        assert line["runs"] == "2"
    page = (result.folder / "study.md").read_text()
    assert f"{np.mean(values[0.5]):.4f} ± {np.std(values[0.5], ddof=1):.4f}" in page
    everything = table(result.folder / "runs.csv")
    assert [float(line["accuracy"]) for line in everything] == [r.measure("accuracy") for r in result.runs]
    for picture in result.study.plots:
        assert (result.folder / "plots" / f"{picture.name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"plots/{picture.name}.png" in page


def test_an_interrupted_training_goes_on(tmp_path, command, monkeypatch):
    file = tmp_path / "s.toml"
    file.write_text(
        DIGITS.replace("epochs = 1\n", "epochs = 3\n").replace("[0.25, 0.5]", "[0.5]").replace("[0, 1]", "[0]")
    )
    steps = []
    fit = cuq.steps.fit_network

    def watched(*arguments, progress, stage, **options):
        def tell(event):
            steps.append((stage, event.step))
            if stage == "fine-tuning" and stop and event.step > 2 * event.steps // 3:
                raise KeyboardInterrupt
            progress(event)

        return fit(*arguments, progress=tell, stage=stage, **options)

    monkeypatch.setattr(cuq.steps, "fit_network", watched)
    stop = True
    code, _, err = command("study", file)
    assert code == 130
    assert "nothing is half-written" in one_line(err)
    assert "goes on" in err
    folder = tmp_path / "s-study"
    assert not list((folder / "runs").iterdir())
    assert len(list((folder / "shared").glob("tuned-*/*.pt"))) == 1
    whole = max(step for stage, step in steps if stage == "fine-tuning") - 1
    steps.clear()
    stop = False
    assert command("study", file)[0] == 0
    assert {stage for stage, _ in steps} == {"fine-tuning"}, "the dense model is there"
    assert min(step for _, step in steps) == whole + 1, "two of three epochs are there"
    assert not any((folder / "work").iterdir())
    assert not list((folder / "shared").glob("tuned-*/")), "what no run needs is gone"


def test_runs_that_differ_after_training_share_it(tmp_path, monkeypatch):
    file = tmp_path / "s.toml"
    grid = '[grid]\nsparsity = [0.5]\nuq = ["msp", "laplace"]\nscore = ["confidence", "entropy"]\nseed = [0]\n'
    file.write_text(DIGITS.split("[grid]")[0].replace("epochs = 1", "resplits = 3\nepochs = 1") + grid)
    steps = []
    fit = cuq.steps.fit_network

    def watched(*arguments, progress, stage, **options):
        return fit(*arguments, progress=lambda event: steps.append(stage), stage=stage, **options)

    monkeypatch.setattr(cuq.steps, "fit_network", watched)
    result = cuq.run_study(file, tmp_path / "out")
    found = {(run.values["uq"], run.values["score"]): run.record["result"] for run in result.runs}
    assert len(found) == 4
    images = 1797 * 0.8 * 0.9
    assert steps.count("fine-tuning") == pytest.approx(images / 128, abs=1), "one epoch for four runs"
    by_score = [found["msp", score] for score in ("confidence", "entropy")]
    assert by_score[0]["accuracy"] == by_score[1]["accuracy"]
    assert by_score[0]["error_auroc"] != by_score[1]["error_auroc"]
    assert by_score[0]["ood_1_auroc"] == by_score[0]["ood_auroc"]
    assert 0 < by_score[0]["ece_resplit"] < 0.3
    assert by_score[0]["ece_resplit_sd"] > 0
    assert found["laplace", "confidence"]["training_seconds"] == by_score[0]["training_seconds"]


def test_an_interruption_between_runs_keeps_what_is_done(fake, command, tmp_path):
    file = write(tmp_path, "b = [0.1, 0.2, 0.3]")

    def stop(settings, context):
        if settings.b == 0.2 and not fake.done[1:]:
            raise KeyboardInterrupt

    fake.before = stop
    assert command("study", file)[0] == 130
    assert len(list((tmp_path / "s-study" / "runs").iterdir())) == 1
    code, _, err = command("study", file, "--dry-run")
    assert code == 0
    assert "3 runs, 2 to do" in err
    assert err.count(" done ") == 1
    fake.before = lambda *_: None
    assert command("study", file)[0] == 0
    assert fake.done == [("x", 0.1, 0), ("x", 0.2, 0), ("x", 0.3, 0)]


def test_two_at_once_share_the_runs(fake, tmp_path):
    file = write(tmp_path, "b = [0.1, 0.2, 0.3, 0.4]\nseed = [0, 1]")
    made = []

    def slow(settings, context):
        context.shared.record("thing", {"b": settings.b}, lambda: time.sleep(0.02) or made.append(settings.b) or {})
        time.sleep(0.02)

    fake.before = slow
    results = []
    workers = [threading.Thread(target=lambda: results.append(cuq.run_study(file, tmp_path / "o"))) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 3
    assert len(fake.done) == len(set(fake.done)) == 8
    assert sorted(made) == [0.1, 0.2, 0.3, 0.4]
    assert not cuq.plan_study(file, tmp_path / "o").to_do


@pytest.mark.skipif(sys.platform == "win32", reason="holds the lock through fcntl")
def test_a_run_that_another_process_does_is_left_to_it_until_that_is_gone(fake, tmp_path):
    file = write(tmp_path, "b = [0.1, 0.2]")
    first = cuq.plan_study(file, tmp_path / "o").runs[0]
    lock = tmp_path / "o" / "locks" / f"{first.key}.lock"
    lock.parent.mkdir(parents=True)
    (tmp_path / "o" / "runs").mkdir()
    hold = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); time.sleep(99)"
    with subprocess.Popen([sys.executable, "-c", hold, lock], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline()
        with held_or_not(lock) as ours:
            assert not ours
        result = cuq.run_study(file, tmp_path / "o")
        assert [run.key for run in result.elsewhere] == [first.key]
        assert fake.done == [("x", 0.2, 0)]
        other.kill()
    assert not cuq.run_study(file, tmp_path / "o").to_do


def test_a_run_that_fails_is_told_and_the_study_goes_on(fake, command, tmp_path):
    file = write(tmp_path, 'a = ["refused", "x"]\nseed = [0, 1]')
    code, out, err = command("study", file, "--json")
    assert code == 2
    assert "2 of 4 runs failed" in one_line(err)
    assert "nothing was pruned: raise --sparsity" in one_line(err)
    listed = json.loads(out)["runs"]
    assert [bool(run["result"]) for run in listed] == [False, False, True, True]
    page = (tmp_path / "s-study" / "study.md").read_text()
    assert "| refused | failed | failed |" in page
    assert page.count("nothing was pruned: raise --sparsity") == 2
    assert [row["error"] for row in table(tmp_path / "s-study" / "runs.csv")][2:] == ["", ""]
    fake.done.clear()
    assert command("study", file)[0] == 2
    assert fake.done == [("refused", 0.0, 0), ("refused", 0.0, 1)], "failed runs are tried again"


def test_a_fault_of_ours_does_not_stop_the_others(fake, command, tmp_path):
    code, _, err = command("study", write(tmp_path, 'a = ["fault", "x"]'))
    assert code == 3
    assert "ZeroDivisionError: oops" in err
    assert "fault of compress-uq" in one_line(err)
    assert len(fake.done) == 2


@pytest.mark.parametrize(
    ("grid", "more", "message"),
    [
        ("c = [1]", "", "unknown setting in [grid] 'c'"),
        ("sed = [1]", "", "did you mean 'seed'"),
        ("b = 0.5", "", "a single value belongs in [defaults]"),
        ("b = []", "", "expected at least one value"),
        ("", "", "there is no grid"),
        ("b = [", "", "s.toml is not TOML"),
        ("b = [1]", "[table]\nx = 1", "unknown section 'table': did you mean 'tables'"),
        ("b = [1]", "[defaults]\nsed = 1", "unknown setting in [defaults] 'sed': did you mean 'seed'"),
        ("b = [1]", "[defaults]\na = 'never'", "the run with b = 1: a = 'never'"),
        ("b = [1]", '[[tables]]\nmeasures = ["z"]', "unknown measure 'z'"),
        ("b = [1]", '[[tables]]\nrow = ["b"]', "did you mean 'rows'"),
        ("b = [1]", '[[tables]]\nrows = ["a"]', "unknown axis in [[tables]] 'a'"),
        ('b = [1, 2]\na = ["x", "z"]', '[[tables]]\nrows = ["b"]', "leaves out the axis 'a'"),
        ("b = [1]", '[[plots]]\nx = "b"', "needs y"),
        ("b = [1]", '[[plots]]\ny = "yy"', "unknown measure 'yy'"),
        ("b = [1]", '[[plots]]\ny = "y"\nlines = "b"', "plots lines = 'b': expected a list of strings"),
        ("b = [1]", "[choose]\nat-most = 1", "needs measure"),
        ("b = [1]", "[choose]\nmeasure = 'y'\nat-most = 1\nat-least = 2", "expected one bound"),
        ("b = [1]", "[choose]\nmeasure = 'dense_y'", "no figure on held-out data"),
        ("b = [1]", "[choose]\nmeasure = 'y'\nat-most = '1'", "expected a number"),
        ('a = ["x", "z"]', "[choose]\nmeasure = 'y'\nprefer = 'a'", "values are all numbers"),
    ],
)
def test_a_wrong_file_ends_in_one_line_and_nothing_written(fake, command, tmp_path, grid, more, message):
    file = write(tmp_path, grid, more)
    code, out, err = command("study", file)
    assert (code, out) == (2, "")
    assert message in one_line(err)
    assert [path.name for path in tmp_path.iterdir()] == ["s.toml"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('arch = "compress-uq:cnn"\n', 'model = "none.pt"\n'), "dense says how a model is trained"),
        (("sparsity =", "sparsty ="), "did you mean 'sparsity'"),
        (("epochs = 1\n", 'epochs = "1"\n'), "epochs = '1': expected a whole number"),
        (("epochs = 1\n", "epochs = -1\n"), "epochs=-1"),
        (("[0, 1]", "[0.5]"), "the run with sparsity = 0.25, seed = 0.5: seed = 0.5: expected a whole number"),
        (("epochs = 1\n", 'criterion = "l11"\n'), "did you mean 'l1'"),
        (("epochs = 1\n", 'criterion-option = {k = 1}\n'), "unknown option of l1 'k'"),
        (("[grid]", "[choose]\nmeasure = 'ood_auroc'\n[grid]"), "no figure on held-out data"),
        (("epochs = 1\n", 'budget = "ece<0.1"\n'), "budget 'ece<0.1'"),
        (("epochs = 1\n", 'schedule = "oneshot"\n'), "did you mean 'one-shot'"),
        (("epochs = 1\n", 'uq = "mcdropout"\n'), "did you mean 'mc-dropout'"),
        (("epochs = 1\n", 'calibration = "temprature"\n'), "did you mean 'temperature'"),
        (("epochs = 1\n", 'device = "cuda:77"\n'), "cuda:77"),
        (("lr = 0.02", "rl = 0.02"), "unknown setting of dense 'rl'"),
        (('data = "digits"\n', ""), "from which a dense model is trained"),
        (("ood =", "out = 'x'\nood ="), "unknown setting in [defaults] 'out'"),
        (('data = "digits"', 'data = "digitz"'), "did you mean 'digits'"),
        (("epochs = 1\n", 'ood-score = "auto"\n'), "pass --validation-ood"),
        (("epochs = 1\n", 'validation-ood = "sinthetic"\n'), "did you mean 'synthetic'"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused_before_anything_runs(command, tmp_path, change, message):
    (tmp_path / "s.toml").write_text(DIGITS.replace(*change))
    code, _, err = command("study", "s.toml")
    assert code == 2
    assert message in one_line(err)
    assert [path.name for path in tmp_path.iterdir()] == ["s.toml"]


def test_files_and_folders_that_are_not_there_or_not_ours(fake, command, tmp_path):
    assert "none.toml: No such file" in one_line(command("study", "none.toml")[2])
    (tmp_path / "m.toml").write_text('[defaults]\nmodel = "none.pt"\n[grid]\nsparsity = [0.5]\n')
    assert "model = 'none.pt': no such file" in one_line(command("study", "m.toml")[2])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    code, _, err = command("study", write(tmp_path, "b = [1]"), "--out", "mine")
    assert code == 2
    assert "not a study's folder" in one_line(err)
    result = cuq.run_study(tmp_path / "s.toml", tmp_path / "o")
    (record,) = (result.folder / "runs").glob("*.json")
    record.write_text("{")
    assert f"{record.name} is not the record of a run" in one_line(command("study", "s.toml", "--out", "o")[2])


def test_every_option_of_prune_is_a_setting():
    own = {"out", "overwrite", "config", "dry_run", "resume", "require", "json"}
    options = {parameter.name for parameter in typer.main.get_command(app).commands["prune"].params}
    assert options - own <= cuq.study.KINDS["compress"].settings


def test_several_grids_are_done_together_and_each_run_once(fake, tmp_path):
    (tmp_path / "s.toml").write_text(
        '[study]\nkind = "fake"\n[[grid]]\na = ["x"]\nb = [0.1, 0.2]\nseed = [0, 1]\n[[grid]]\na = ["x", "z"]\nb = [0.1]\n'
    )
    result = cuq.run_study(tmp_path / "s.toml", tmp_path / "o")
    assert fake.done == [("x", 0.1, 0), ("x", 0.1, 1), ("x", 0.2, 0), ("x", 0.2, 1), ("z", 0.1, 0)]
    ((_, head, rows),) = result.tables()
    assert head == ["a", "b", "y", "cost"]
    assert rows == [
        ["x", "0.1", "0.6000 ± 0.7071", "100.0000 ± 0.0000"],
        ["x", "0.2", "0.7000 ± 0.7071", "200.0000 ± 0.0000"],
        ["z", "0.1", "0.1000", "100.0000"],
    ]


def test_tables_by_columns_and_conditions(fake, tmp_path):
    file = write(
        tmp_path, 'a = ["x", "refused", "z"]\nb = [1, 2]\nseed = [0, 2, 4]',
        '[[tables]]\nname = "by b"\nrows = ["a"]\ncolumns = "b"\nmeasures = ["y"]\nwhere = {a = ["x", "refused"]}\n'
        '[[tables]]\nname = "by b"\nrows = ["b"]\nwhere = {a = "z"}\nmeasures = ["cost"]\n',
    )  # fmt: skip
    result = cuq.run_study(file, tmp_path / "o")
    first, second = result.tables()
    assert first[1:] == (
        ["a", "y, b 1", "y, b 2"],
        [["x", "3.0000 ± 2.0000", "4.0000 ± 2.0000"], ["refused"] + ["failed"] * 2],
    )
    assert second[1:] == (["b", "cost"], [["1", "1,000 ± 0"], ["2", "2,000 ± 0"]])
    lines = list(csv.reader(io.StringIO((tmp_path / "o" / "tables" / "by-b.csv").read_text())))
    assert lines[:2] == [["a", "b", "runs", "y_mean", "y_sd"], ["x", "1", "3", "3.0", "2.0"]]
    assert (tmp_path / "o" / "tables" / "by-b-2.csv").is_file()


def test_the_choice_looks_at_held_out_data_only(fake, command, tmp_path):
    # On test y rises with b, on held-out data it falls: 10 - b - seed.
    file = write(
        tmp_path, "b = [1, 2, 3, 4]\nseed = [0, 1]", "[choose]\nmeasure = 'y'\nat-most = 7.5\nprefer = 'cost'\n"
    )
    code, out, err = command("study", file, "--json")
    assert code == 0
    chosen = json.loads(out)["chosen"]
    assert chosen["settings"] == {"b": 2}, "the cheapest of 2, 3 and 4, whose held-out figures are 7.5, 6.5 and 5.5"
    assert chosen["held_out"] == {"mean": 7.5, "sd": pytest.approx(0.5**0.5), "count": 2}
    assert chosen["test"]["y"]["mean"] == 2.5
    assert "b 2: 7.5000 ± 0.7071 on held-out data, by the rule: y at most 7.5, the lowest cost" in err
    write(tmp_path, "b = [1, 2, 3, 4]\nseed = [0, 1]", "[choose]\nmeasure = 'y'\nat-most = 5\n")
    code, _, err = command("study", file)
    assert code == 1
    assert "no combination has y at most 5, the lowest y on held-out data; the nearest has 5.5" in one_line(err)
    write(tmp_path, "b = [1, 2, 3, 4]\nseed = [0, 1]", "[choose]\nmeasure = 'y'\nat-least = 7.5\nprefer = 'y'\n")
    assert cuq.plan_study(file, tmp_path / "s-study").chosen.group.values == {"b": 2}


def test_a_choice_says_what_it_left_out(fake, tmp_path):
    file = write(tmp_path, 'a = ["x", "refused"]\nseed = [0, 1]', "[choose]\nmeasure = 'y'\n")
    chosen = cuq.run_study(file, tmp_path / "o").chosen
    assert chosen.group.values == {"a": "x"}
    assert (chosen.left_out, chosen.to_json()["left_out"]) == (1, 1)
    assert "1 combinations left out" in chosen.text()


def test_a_half_that_nothing_fits_stays_uncalibrated(dense, splits):
    model = cuq.fit_uncertainty(dense.model, splits, method="msp")
    images = torch.stack([image for image, _ in splits.calibration])
    labels = model(images).label
    right = cuq.Splits(calibration=torch.utils.data.TensorDataset(images, labels))
    found, source = held_out_figures(cuq.calibrate(model, splits), right)
    assert "2 of them uncalibrated" in source
    assert found["accuracy"] == 1
    assert found["nll"] == pytest.approx(float(-model(images).confidence.log().mean()), abs=1e-5)


def test_held_out_figures_are_cross_fitted_by_hand(dense, splits):
    model = cuq.calibrate(cuq.fit_uncertainty(dense.model, splits, method="msp"), splits)
    found, source = held_out_figures(model, splits)
    images = torch.stack([image for image, _ in splits.calibration])
    labels = np.array([label for _, label in splits.calibration])
    halves = cuq.data.take_class_balanced(torch.from_numpy(labels), 0.5, seed=0)
    with torch.no_grad():
        logits = model.member_logits(images)[0].double().numpy()
    probabilities = np.empty_like(logits)
    for one, other in (halves, halves[::-1]):
        losses = {}
        for t in np.exp(np.linspace(-3, 3, 6001)):
            z = logits[one] / t
            losses[t] = (np.log(np.exp(z).sum(1)) - z[np.arange(len(one)), labels[one]]).mean()
        z = np.exp(logits[other] / min(losses, key=losses.get))
        probabilities[other] = z / z.sum(1, keepdims=True)
    assert sorted(halves[0] + halves[1]) == list(range(len(labels)))
    assert found["nll"] == pytest.approx(-np.log(probabilities[np.arange(len(labels)), labels]).mean(), abs=1e-4)
    assert found["accuracy"] == np.mean(probabilities.argmax(1) == labels)
    assert "cross-fitted" in source
    given = cuq.Splits(calibration=splits.calibration, decision=splits.test)
    found, source = held_out_figures(model, given)
    assert found["ece"] == pytest.approx(cuq.evaluate(model, splits).metrics["ece"].value)
    assert "decision" in source
    assert held_out_figures(model, cuq.Splits(test=splits.test))[0] == {}


def test_plots_show_means_bars_and_the_dense_model(fake, tmp_path, monkeypatch):
    file = write(
        tmp_path, 'a = ["x", "z"]\nb = [2, 1]\nseed = [0, 2]',
        '[[plots]]\nx = "b"\ny = "y"\n[[plots]]\nname = "cost"\nx = "cost"\ny = "y"\nlines = ["a"]\nwhere = {a = "z"}\n'
        '[[plots]]\nname = "names"\nx = "a"\ny = "cost"\n',
    )  # fmt: skip
    result = cuq.run_study(file, tmp_path / "o")
    drawn, levels = [], []
    real_bars, real_line = matplotlib.axes.Axes.errorbar, matplotlib.axes.Axes.axhline

    def bars(self, x, y, **options):
        drawn.append((options["label"], x, y, options["xerr"], options["yerr"]))
        return real_bars(self, x, y, **options)

    def line(self, y, **options):
        levels.append(y)
        return real_line(self, y, **options)

    monkeypatch.setattr(matplotlib.axes.Axes, "errorbar", bars)
    monkeypatch.setattr(matplotlib.axes.Axes, "axhline", line)
    sd = pytest.approx([2**0.5] * 2)
    first, second, third = result.study.plots
    assert draw(first, result.study, result.runs).startswith(b"\x89PNG")
    assert drawn == [("a x", [1.0, 2.0], [2.0, 3.0], None, sd), ("a z", [1.0, 2.0], [2.0, 3.0], None, sd)]
    assert levels == [2.0]
    drawn.clear()
    draw(second, result.study, result.runs)
    assert drawn == [("a z", [1000.0, 2000.0], [2.0, 3.0], None, sd)]
    drawn.clear()
    draw(third, result.study, result.runs)
    assert drawn == [
        ("b 2", [0.0, 1.0], [2000.0, 2000.0], None, None),
        ("b 1", [0.0, 1.0], [1000.0, 1000.0], None, None),
    ]
    assert draw(first, result.study, cuq.plan_study(file, tmp_path / "empty").runs) is None
    assert sorted(path.name for path in (tmp_path / "o" / "plots").iterdir()) == ["cost.png", "names.png", "plots.png"]


def test_the_examples_read(monkeypatch):
    folder = Path(__file__).resolve().parent.parent / "examples"
    monkeypatch.setattr(cuq.study.settings, "_file_hash", lambda setting, path: "0" * 64)
    study = cuq.read_study(folder / "study.toml")
    assert study.axes == ("sparsity",)
    assert {plot.y for plot in study.plots} >= {"accuracy", "ece", "ause", "accuracy_at_50"}
    for file in folder.glob("*.toml"):
        assert cuq.plan_study(file, os.devnull + "-none").to_do, file
