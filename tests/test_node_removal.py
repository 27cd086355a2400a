"""Node-removal studies: figures as by hand, networks trained once, the thesis' setting by default."""

import pytest
import torch
from torch.nn import functional as F

import compress_uq as cuq
from compress_uq.errors import InputError, UnknownNameError
from compress_uq.study.node_removal import NodeRemovalKind
from small_models import own

STUDY = """
[study]
kind = "node-removal"
[defaults]
data = "digits"
arch-option = {widths = [16]}
epochs = 2
lr = 0.01
images = 300
removals = 5
[[grid]]
algorithm = ["draw"]
nodes = [1, 6]
[[grid]]
algorithm = ["random", "precomputed", "greedy", "exhaustive"]
nodes = [2]
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nodes")
    (folder / "nodes.toml").write_text(STUDY)
    return folder, cuq.run_study(folder / "nodes.toml", folder / "out")


def test_draws_are_measured_on_the_whole_test_split(study):
    folder, result = study
    assert not result.to_do
    assert len(list((folder / "out" / "shared").glob("dense-*.pt"))) == 1
    model = cuq.load_model(next((folder / "out" / "shared").glob("dense-*.pt"))).eval()
    splits = cuq.load_splits("digits", reserve=False, mean=(0.0,), std=(1.0,))
    images, labels = (
        torch.stack([splits.test[i][0] for i in range(len(splits.test))]),
        cuq.data.labels_of(splits.test),
    )

    def figures(nodes):
        with torch.no_grad():
            weight = model[3].weight.clone()
            model[3].weight[:, nodes] = 0
            logits = model(images)
            model[3].weight.copy_(weight)
        return (logits.argmax(1) == labels).double().mean().item(), F.cross_entropy(logits, labels).item()

    for run in result.runs[:2]:
        generator = torch.Generator().manual_seed(0)
        drawn = [figures(torch.randperm(16, generator=generator)[: run.values["nodes"]]) for _ in range(5)]
        accuracy, loss = torch.tensor(drawn, dtype=torch.float64).T
        base = figures([])
        assert run.measure("base_accuracy") == pytest.approx(base[0])
        assert run.measure("accuracy") == pytest.approx(accuracy.mean().item())
        assert run.measure("accuracy_sd") == pytest.approx(accuracy.std().item())
        assert run.measure("accuracy_50") == pytest.approx(accuracy.sort().values[2].item())
        assert run.measure("accuracy_drop") == pytest.approx(base[0] - accuracy.mean().item())
        assert run.measure("loss") == pytest.approx(loss.mean().item(), abs=1e-6)
        assert run.measure("loss_rise") == pytest.approx(loss.mean().item() - base[1], abs=1e-6)
        assert run.measure("removed") == run.values["nodes"]


def test_searches_say_how_many_nodes_can_go(study):
    random, *others = study[1].runs[2:]
    assert random.measure("removed_max") % 2 == 0
    assert random.measure("removed_sd") is not None
    for run in others:
        assert run.measure("removed_sd") is None
        assert run.measure("important") + run.measure("zero") + run.measure("worse") == 16
    precomputed = others[0]
    assert precomputed.measure("removed") == min(15, 16 - precomputed.measure("important"))


def test_the_setting_is_the_thesis():
    read = NodeRemovalKind().read({"data": "mnist", "seed": 3})
    assert own("mlp", (1, 28, 28), **read.arch_option)[1].out_features == 128
    training = read.training
    assert (training.optimizer, training.lr, training.batch_size, training.epochs) == ("adam", 0.001, 32, 5)
    assert (training.lr_schedule, training.weight_decay, training.augment) == ("constant", 0, "none")
    assert (read.initial, training.seed) == ("glorot", 3)
    assert (read.mean, read.std, read.removals) == ((0.0,), (1.0,), 20)


def test_refused(tmp_path):
    kind = NodeRemovalKind()
    with pytest.raises(InputError, match="needs data"):
        kind.read({})
    with pytest.raises(UnknownNameError, match="did you mean 'greedy'"):
        kind.read({"data": "digits", "algorithm": "gredy"})
    with pytest.raises(UnknownNameError, match="initial 'keras'"):
        kind.read({"data": "digits", "initial": "keras"})
    with pytest.raises(InputError, match="nodes = 0"):
        kind.read({"data": "digits", "nodes": 0})
    deep = """
        [study]
        kind = "node-removal"
        [defaults]
        data = "digits"
        arch-option = {widths = [16, 8]}
        epochs = 0
        [grid]
        nodes = [16]
    """
    (tmp_path / "deep.toml").write_text(deep)
    (run,) = cuq.run_study(tmp_path / "deep.toml", tmp_path / "deep").failed
    assert "several layers" in run.failure
    (tmp_path / "wide.toml").write_text(deep.replace("epochs = 0", 'epochs = 0\nlayer = "1"'))
    (run,) = cuq.run_study(tmp_path / "wide.toml", tmp_path / "wide").failed
    assert "nodes = 16: 1 has 16" in run.failure
