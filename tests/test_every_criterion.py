"""What holds for every criterion and every schedule by name."""

import copy

import pytest
import torch
from torch import nn

import compress_uq as cuq
from compress_uq.pruning import CRITERIA, SCHEDULES
from small_models import SMALL, own
from test_pruning import zero_consumers

IMAGE = torch.randn(1, *SMALL)
QUICK = cuq.TrainingConfig(epochs=5, lr=0.01, batch_size=32, device="cpu")


def coloured(count=96):
    """Noise whose mean tells the class, so that there is something to lose."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 10
    images = torch.randn(count, *SMALL, generator=generator) + labels.view(-1, 1, 1, 1) / 3
    return cuq.Splits(train=torch.utils.data.TensorDataset(images, labels))


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    return cuq.finetune(own("resnet20"), coloured(), training=QUICK, augment="none").model


def criterion_of(name):
    return CRITERIA[name](**{"loss": {"images": 16}, "hrank": {"images": 64}}.get(name, {}))


@pytest.fixture(scope="module")
def pruned(trained):
    """Prunes by each criterion once."""
    done = {}

    def run(name, seed=0, fresh=False):
        if fresh or (name, seed) not in done:
            done[name, seed] = cuq.prune(
                trained, IMAGE, sparsity=0.4, criterion=criterion_of(name), round_to=1, splits=coloured(), seed=seed,
                training=QUICK, augment="none", recalibrate=False,
            )  # fmt: skip
        return done[name, seed]

    return run


def removed(result):
    return [layer.removed for layer in result.layers]


@pytest.mark.parametrize("name", CRITERIA.names)
def test_a_criterion_removes_what_was_asked_and_nothing_else(name, trained, pruned):
    before = copy.deepcopy(trained.state_dict())
    result = pruned(name)
    assert all(layer.after == layer.before - int(layer.before * 0.4) for layer in result.layers)
    assert all(torch.equal(value, before[key]) for key, value in trained.state_dict().items())
    assert not trained.training
    assert all(p.requires_grad and p.grad is None for p in result.model.parameters())
    assert result.settings["criterion"]["name"] == name
    assert len(result.history) == (QUICK.epochs if criterion_of(name).trains else 0)
    images = torch.randn(2, *SMALL)
    with torch.no_grad():
        answer = result.model(images)
        if not result.history:
            assert torch.allclose(answer, zero_consumers(trained, result.layers)(images), atol=1e-4)
    assert answer.shape == (2, 10)


@pytest.mark.parametrize("name", ["random", "hrank", "taylor", "hessian", "resrep"])
def test_the_same_seed_gives_the_same_choice(name, pruned):
    assert removed(pruned(name)) == removed(pruned(name, fresh=True))


def test_criteria_differ(pruned):
    choices = {name: tuple(removed(pruned(name))) for name in CRITERIA.names}
    same = {frozenset((a, b)) for a in choices for b in choices if a < b and choices[a] == choices[b]}
    # Inside a layer a squared norm over a sum has the order of the norm.
    assert same <= {frozenset(("l2", "lamp"))}
    assert removed(pruned("random")) != removed(pruned("random", seed=1))


@pytest.mark.parametrize("name", SCHEDULES.names)
def test_a_schedule_runs_through_compress(name):
    splits = coloured(200)
    images, labels = splits.train.tensors
    parts = cuq.Splits(
        train=torch.utils.data.TensorDataset(images[:120], labels[:120]),
        calibration=torch.utils.data.TensorDataset(images[120:160], labels[120:160]),
        test=torch.utils.data.TensorDataset(images[160:], labels[160:]),
    )
    torch.manual_seed(1)
    initial = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 10),
    )  # fmt: skip
    dense = cuq.finetune(initial, parts, training=QUICK, augment="none").model
    bundle = cuq.compress(
        dense, parts, sparsity=0.5, round_to=1, schedule=name, initial=initial, uq="msp", training=QUICK, augment="none"
    )
    pruning = bundle.report.recipe["pruning"]
    assert pruning["schedule"]["name"] == name
    assert pruning["epochs"] == {"one-shot": 0, "iterative": 3, "lottery": 0}[name]
    assert sorted(pruning["channels"].values()) == [[16, 8], [24, 12]]
