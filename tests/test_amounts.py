"""How much goes: sparsities by layer, global order, targets, what is kept, schedules."""

import copy

import pytest
import torch
from torch import nn

import compress_uq as cuq
from compress_uq.cost import measure_cost
from compress_uq.errors import DataError, InputError, PruningError, UnknownNameError
from compress_uq.pruning import Evidence, Iterative, Lottery, Target
from compress_uq.pruning.amounts import removal_order
from compress_uq.pruning.graph.groups import dependency_groups
from compress_uq.pruning.ledger import Ledger
from small_models import PRUNABLE, SMALL, own, randomise

IMAGE = torch.randn(1, 3, 32, 32)


def small_splits(count=64, shape=SMALL, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, *shape, generator=generator)
    return cuq.Splits(train=torch.utils.data.TensorDataset(images, torch.arange(count) % 10))


QUICK = cuq.TrainingConfig(epochs=2, lr=0.01, batch_size=32, device="cpu")


@pytest.mark.parametrize("quantity", ["macs", "params"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_targets_are_met_within_two_percent_at_or_below(quantity, share):
    model = own("resnet20")
    result = cuq.prune(model, IMAGE, target=f"{quantity}={share}", round_to=1)
    counted = measure_cost(result.model, SMALL)
    dense = measure_cost(model, SMALL)
    reached = counted.macs / dense.macs if quantity == "macs" else counted.parameters / dense.parameters
    assert share - 0.02 <= reached <= share
    assert result.target.reached == pytest.approx(reached)


def test_a_target_with_rounding_is_the_nearest_point_below():
    model = own("resnet18")
    result = cuq.prune(model, IMAGE, target="macs=0.4")
    assert all(layer.after % 8 == 0 for layer in result.layers)
    assert 0.3 < result.target.reached <= 0.4
    groups = dependency_groups(copy.deepcopy(model), IMAGE)
    order = removal_order(groups, None, 8)
    counts = {layer.name: layer.before - layer.after for layer in result.layers}
    reachable = {tuple(order.counts(n)) for n in range(len(order.order) + 1)}
    chosen = tuple(counts[group.name] for group in groups)
    assert chosen in reachable
    larger = [c for c in reachable if sum(c) < sum(chosen)]
    nearest = max(larger, key=sum)
    rebuilt = cuq.prune(
        model,
        IMAGE,
        sparsity={g.name: (n + 0.5) / g.channels for g, n in zip(groups, nearest, strict=True) if n},
        round_to=1,
    )
    assert rebuilt.after.macs > 0.4 * rebuilt.before.macs, "one step less would not meet it"


def test_a_latency_target_is_met_on_this_machine():
    result = cuq.prune(own("resnet18"), IMAGE, target="latency=0.5")
    assert result.target.reached <= 0.55
    assert result.after.macs < 0.8 * result.before.macs


@pytest.mark.parametrize("name", ["resnet20", "cnn", "concat", "torchvision mobilenet_v2", "torchvision densenet121"])
def test_the_ledger_counts_what_is_really_left(name):
    model, shape = PRUNABLE[name]()
    example = torch.randn(1, *shape)
    model.eval()
    before = measure_cost(model, shape)
    groups = dependency_groups(copy.deepcopy(model), example)
    ledger = Ledger(model, example, groups, before.macs, before.parameters)
    result = cuq.prune(model, example, sparsity=0.4, round_to=1)
    counts = {layer.name: layer.before - layer.after for layer in result.layers}
    removed = [counts[group.name] for group in groups]
    assert ledger.macs(removed) == pytest.approx(result.after.macs, rel=1e-6)
    assert ledger.parameters(removed) == pytest.approx(result.after.parameters, rel=1e-6)
    assert ledger.macs([0] * len(groups)) == before.macs


def test_a_target_out_of_reach_says_what_can_be_reached():
    with pytest.raises(
        PruningError, match=r"macs=0.001 cannot be met: the smallest reachable with round_to 8 is macs=0\.\d+"
    ):
        cuq.prune(own("resnet20"), IMAGE, target="macs=0.001")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("macs", PruningError), ("macs=x", PruningError), ("flops=0.5", UnknownNameError), ("macs=0", PruningError),
        ("params=1.5", PruningError), ("latency=nan", PruningError),
    ],
)  # fmt: skip
def test_targets_that_cannot_be(text, error):
    with pytest.raises(error, match="target"):
        cuq.prune(own("resnet20"), IMAGE, target=text)


def test_one_of_sparsity_and_target():
    with pytest.raises(PruningError, match="one of the two"):
        cuq.prune(own("resnet20"), IMAGE, sparsity=0.5, target=Target("macs", 0.5))
    with pytest.raises(PruningError, match="--sparsity"):
        cuq.prune(own("resnet20"), IMAGE)


def test_a_sparsity_for_each_layer():
    result = cuq.prune(own("resnet20"), IMAGE, sparsity="layer1.*.conv1=0.5,layer3=0.25", round_to=1)
    after = {layer.name: layer.after / layer.before for layer in result.layers}
    assert {n for n, share in after.items() if share == 0.5} == {f"layer1.{i}.conv1" for i in range(3)}
    assert all(share == 0.75 for n, share in after.items() if n.startswith("layer3"))
    assert all(share == 1 for n, share in after.items() if n.startswith("layer2"))
    for bad in ({"nowhere": 0.5}, {"layer1": 1.5}):
        with pytest.raises(PruningError, match=next(iter(bad))):
            cuq.prune(own("resnet20"), IMAGE, sparsity=bad)


def test_keep_by_name_pattern_and_type():
    model = own("cnn", (1, 28, 28), widths=(32, 32), hidden=(32,))
    image = torch.randn(1, 1, 28, 28)
    whole = {layer.name: layer.before for layer in cuq.prune(model, image, sparsity=0.5).layers}
    for keep in ("Conv2d", next(iter(whole))):
        result = cuq.prune(model, image, sparsity=0.5, keep=[keep])
        kept = [name for name in whole if name not in {layer.name for layer in result.layers}]
        assert kept
        for name in kept:
            assert result.model.get_submodule(name).weight.shape[0] == whole[name]
    with pytest.raises(PruningError, match="'layer9': no prunable layer"):
        cuq.prune(model, image, sparsity=0.5, keep="layer9")
    with pytest.raises(PruningError, match="matches every"):
        cuq.prune(model, image, sparsity=0.5, keep=["Conv2d", "Linear"])


def tiny_scales(model: nn.Module) -> nn.Module:
    """Half of the layers with weights that a global order would remove first, whole."""
    with torch.no_grad():
        for number, module in enumerate(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            module.weight.mul_(1e-3 if number % 2 else 1.0)
    return model


def test_global_scope_never_grows_with_the_ratio_and_empties_no_layer():
    model = tiny_scales(randomise(own("vgg19")))

    def scale(group):
        norm = next(layer.module for layer in group.layers if isinstance(layer.module, nn.BatchNorm2d))
        return norm.weight.detach().double()

    sizes = []
    for sparsity in (0.3, 0.5, 0.7, 0.85):
        result = cuq.prune(model, IMAGE, sparsity=sparsity, scope="global", criterion=scale, round_to=1)
        sizes.append(result.after.parameters)
        assert all(layer.after >= layer.before - int(layer.before * 0.9) for layer in result.layers)
        assert result.sparsity == pytest.approx(sparsity, abs=0.001)
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4
    with pytest.raises(PruningError, match="ask for less"):
        cuq.prune(model, IMAGE, sparsity=0.95, scope="global")


def test_global_scope_takes_the_lowest_of_all_layers():
    model = own("mlp", (1, 8, 8), widths=(4, 4))
    wanted = {4: [5.0, 1.0, 6.0, 7.0], 3: [2.0, 8.0, 3.0, 4.0]}
    groups = dependency_groups(copy.deepcopy(model), torch.randn(1, 1, 8, 8))
    values = {group.name: wanted[4 - i] for i, group in enumerate(groups)}
    result = cuq.prune(
        model, torch.randn(1, 1, 8, 8), sparsity=0.5, scope="global", round_to=1,
        criterion=lambda g: torch.tensor(values[g.name]).double(),
    )  # fmt: skip
    assert {layer.name: layer.removed for layer in result.layers} == {groups[0].name: (1,), groups[1].name: (0, 2, 3)}


def test_all_equal_scores_are_refused():
    with pytest.raises(PruningError, match="gives all 16 channels"):
        cuq.prune(own("resnet20"), IMAGE, sparsity=0.5, criterion=lambda g: torch.ones(g.channels), round_to=1)
    with pytest.raises(PruningError, match="not finite"):
        cuq.prune(
            own("resnet20"), IMAGE, sparsity=0.5, criterion=lambda g: torch.full((g.channels,), torch.nan), round_to=1
        )
    with pytest.raises(PruningError, match="expected \\(16,\\)"):
        cuq.prune(own("resnet20"), IMAGE, sparsity=0.5, criterion=lambda g: torch.ones(3), round_to=1)


@pytest.mark.parametrize("curve", ["linear", "cubic", (0.2, 0.9, 1.0)])
def test_iterative_ends_at_the_same_size_as_one_shot(curve):
    model = randomise(own("resnet20"))
    once = cuq.prune(model, IMAGE, sparsity=0.5, round_to=1)
    stepwise = cuq.prune(
        model, IMAGE, sparsity=0.5, round_to=1, schedule=Iterative(curve=curve), splits=small_splits(), training=QUICK
    )
    assert stepwise.after == once.after
    assert len(stepwise.history) == QUICK.epochs
    assert [layer.removed for layer in stepwise.layers] != [layer.removed for layer in once.layers]


def test_iterative_without_training_removes_what_one_shot_does():
    model = randomise(own("resnet20"))
    none = cuq.TrainingConfig(epochs=0, device="cpu")
    once = cuq.prune(model, IMAGE, sparsity=0.5, round_to=1)
    stepwise = cuq.prune(model, IMAGE, sparsity=0.5, round_to=1, schedule=Iterative(count=4), training=none)
    single = {layer.name: layer.removed for layer in once.layers if "conv1" in layer.name and layer.name != "conv1"}
    steps = {layer.name: layer.removed for layer in stepwise.layers if layer.name in single}
    assert steps.keys() == single.keys()
    assert all(len(steps[name]) == len(single[name]) for name in single)


def test_the_fractions_of_the_curves():
    assert Iterative(count=4).fractions == (0.25, 0.5, 0.75, 1.0)
    assert Iterative(count=2, curve="cubic").fractions == (0.875, 1.0)
    assert [step.epochs for step in Iterative(count=4).steps(7)] == [2, 2, 3, 0]
    assert Iterative(count=4).share == 0.75
    for bad in ({"count": 1}, {"curve": (0.5, 0.4, 1.0)}, {"curve": (0.5,)}):
        with pytest.raises(PruningError):
            Iterative(**bad)
    with pytest.raises(UnknownNameError, match="linear"):
        Iterative(curve="linaer")


def test_a_lottery_ticket_has_the_initial_weights_where_channels_are_left():
    initial = own("mlp", (1, 8, 8), widths=(16,))
    trained = randomise(copy.deepcopy(initial))
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.randn_like(parameter))
    image = torch.randn(1, 1, 8, 8)
    once = cuq.prune(trained, image, sparsity=0.5, round_to=1)
    ticket = cuq.prune(trained, image, sparsity=0.5, round_to=1, schedule="lottery", initial=initial)
    assert ticket.layers == once.layers
    left = [c for c in range(16) if c not in ticket.layers[0].removed]
    name = ticket.layers[0].name
    assert torch.equal(ticket.model.get_submodule(name).weight, initial.get_submodule(name).weight[left])
    with pytest.raises(PruningError, match="initial="):
        cuq.prune(trained, image, sparsity=0.5, round_to=1, schedule="lottery")
    with pytest.raises(PruningError, match="other names or shapes"):
        cuq.prune(trained, image, sparsity=0.5, schedule="lottery", initial=own("mlp", (1, 8, 8), widths=(8,)))


def test_random_and_early_rewinding():
    initial = own("resnet20")
    trained = randomise(copy.deepcopy(initial))
    drawn = cuq.prune(trained, IMAGE, sparsity=0.5, round_to=1, schedule=Lottery(rewind="random"), seed=1)
    again = cuq.prune(trained, IMAGE, sparsity=0.5, round_to=1, schedule=Lottery(rewind="random"), seed=1)
    other = cuq.prune(trained, IMAGE, sparsity=0.5, round_to=1, schedule=Lottery(rewind="random"), seed=2)
    assert torch.equal(drawn.model.conv1.weight, again.model.conv1.weight)
    assert not torch.equal(drawn.model.conv1.weight, other.model.conv1.weight)
    early = cuq.prune(
        trained, IMAGE, sparsity=0.5, round_to=1, schedule=Lottery(rewind="early", rounds=2), initial=initial,
        splits=small_splits(), training=QUICK,
    )  # fmt: skip
    left = [c for c in range(16) if c not in next(x for x in early.layers if x.name == "conv1").removed]
    assert early.model.conv1.weight.shape[0] == len(left) == 8
    assert not torch.equal(early.model.conv1.weight, initial.conv1.weight[left]), "an epoch was trained"


def test_batch_norm_is_recalibrated_from_training_images():
    model = randomise(own("resnet20"))
    splits = small_splits(256)
    plain = cuq.prune(model, IMAGE, sparsity=0.5, round_to=1)
    mended = cuq.prune(model, IMAGE, sparsity=0.5, round_to=1, splits=splits)
    images = torch.stack([splits.train[i][0] for i in range(256)])
    with torch.no_grad():
        first = plain.model.conv1(images)
    assert mended.model.bn1.running_mean == pytest.approx(first.mean((0, 2, 3)), abs=1e-3)
    assert mended.model.bn1.running_var == pytest.approx(first.var((0, 2, 3)), rel=0.02)
    assert not torch.allclose(plain.model.bn1.running_mean, mended.model.bn1.running_mean, atol=1e-3)
    assert torch.equal(plain.model.conv1.weight, mended.model.conv1.weight)
    assert mended.model.bn1.momentum == 0.1
    assert not mended.model.training
    left = cuq.prune(model, IMAGE, sparsity=0.5, round_to=1, splits=splits, recalibrate=False)
    assert torch.equal(plain.model.bn1.running_mean, left.model.bn1.running_mean)
    frozen = copy.deepcopy(model)
    frozen.layer3[2].bn2.requires_grad_(False)
    kept = cuq.prune(frozen, IMAGE, sparsity=0.5, round_to=1, splits=splits)
    assert torch.equal(kept.model.layer3[2].bn2.running_mean, frozen.layer3[2].bn2.running_mean)


def test_training_images_are_asked_for_by_name():
    with pytest.raises(PruningError, match="splits="):
        list(Evidence(own("resnet20"), IMAGE).images("taylor", 8))
    with pytest.raises(DataError, match="train"):
        list(Evidence(own("resnet20"), IMAGE, cuq.Splits()).images("taylor", 8))
    with pytest.raises(InputError, match="splits="):
        cuq.prune(own("resnet20"), IMAGE, sparsity=0.5, schedule="iterative", training=QUICK)
    evidence = Evidence(own("resnet20"), IMAGE, small_splits(100))
    assert [len(images) for images, _ in evidence.images("taylor", 80, 32)] == [32, 32, 16]


def test_a_ticket_of_frozen_initial_weights():
    initial = own("resnet20")
    trained = randomise(copy.deepcopy(initial))
    initial.requires_grad_(False)
    ticket = cuq.prune(trained, IMAGE, sparsity=0.5, round_to=1, schedule="lottery", initial=initial)
    left = [c for c in range(16) if c not in next(x for x in ticket.layers if x.name == "conv1").removed]
    assert torch.equal(ticket.model.conv1.weight, initial.conv1.weight[left])
    assert ticket.model.conv1.weight.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0.5}, "target=0.5"), ({"sparsity": 0.5, "round_to": 2.5}, "round_to=2.5"),
        ({"sparsity": {"conv1": 0.0}}, "removes nothing"), ({"sparsity": "conv1=0.1,conv1=0.2"}, "twice"),
        ({"sparsity": 0.5, "schedule": Iterative}, "configured schedule"), ({"criterion": "loss", "scope": "global"}, "global"),
        ({"sparsity": 0.5, "criterion": lambda group: 1.0}, r"scores \(\)"),
    ],
)  # fmt: skip
def test_options_that_cannot_be(options, message):
    with pytest.raises(PruningError, match=message):
        cuq.prune(own("resnet20"), IMAGE, **options)


def test_options_of_criteria_are_checked_when_they_are_made():
    for make in (
        lambda: cuq.pruning.HRank(images=0), lambda: cuq.pruning.L1(reduction="median"), lambda: Iterative(count=2.5),
    ):  # fmt: skip
        with pytest.raises(InputError):
            make()


def test_options_given_as_texts():
    assert cuq.pruning.configured_schedule("iterative", {"count": "4", "curve": "0.5,1"}) == Iterative(4, (0.5, 1.0))
    assert cuq.pruning.configured_criterion("resrep", {"inner": "true", "lr": "0.1"}).inner is True
    for name, options, message in (
        ("iterative", {"count": "x"}, "count=x: expected a whole number"), ("one-shot", {"count": "3"}, "has no options"),
        ("iterative", {"cuont": "3"}, "did you mean 'count'"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            cuq.pruning.configured_schedule(name, options)
