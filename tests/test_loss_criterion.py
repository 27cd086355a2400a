"""Loss-based importance: equal to removing channel by channel, and the searches that are built on it."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torchvision.models.convnext import LayerNorm2d

import compress_uq as cuq
from compress_uq.data import Splits
from compress_uq.errors import DataError, PruningError, UnknownNameError
from compress_uq.models import as_logits
from compress_uq.pruning.criteria.criterion import Evidence
from compress_uq.pruning.criteria.leave_one_out import Ablation
from compress_uq.pruning.criteria.loss import Loss, importance_classes
from compress_uq.pruning.graph.groups import CoupledLayer, Group, dependency_groups
from oracle import randomise as randomise_all
from small_models import PRUNABLE, own, randomise

SLOW = "resnet18 vgg19 densenet121 convnext_tiny resnext50_32x4d".split()
FAST = [name for name in PRUNABLE if name.split()[-1] not in SLOW]


def cross_entropy(model, images, labels) -> float:
    with torch.no_grad():
        return F.cross_entropy(as_logits(model(images)), labels).item()


def taken_out(model, example, place, channels):
    """The model after surgery: the slow way to leave channels out."""
    smaller = copy.deepcopy(model)
    dependency_groups(smaller, example)[place].remove(channels)
    return smaller


def hidden(model, group, channels):
    """The model with the weights zeroed that read some channels."""
    blind = copy.deepcopy(model)
    for layer in group.layers:
        if layer.side == "in":
            gone = layer.indices[torch.isin(layer.channels, torch.tensor(channels))]
            blind.get_submodule(layer.name).weight.data[:, gone] = 0
    return blind


@pytest.mark.parametrize("name", FAST)
def test_leaving_out_equals_removing(name):
    model, shape = PRUNABLE[name]()
    model = randomise(model).double()
    images, labels = torch.randn(5, *shape).double(), torch.tensor([0, 1, 2, 3, 0])
    groups = dependency_groups(model, images[:1])
    ablation = Ablation(model, groups, images, labels)
    nothing = [[] for _ in groups]
    base = cross_entropy(model, images, labels)
    assert ablation.base(nothing).loss.item() == pytest.approx(base, abs=1e-12)
    effects = []
    for place in {0, len(groups) // 2, len(groups) - 1}:
        group = groups[place]
        parts = torch.arange(group.divisions) * (group.channels // group.divisions)
        choices = torch.randperm(group.channels // group.divisions)[:2].unsqueeze(1) + parts
        for choice, loss in zip(choices.tolist(), ablation.without(place, choices, nothing).loss.tolist(), strict=True):
            slow = taken_out(model, images[:1], place, choice)
            assert loss == pytest.approx(cross_entropy(slow, images, labels), abs=1e-9)
            effects.append(abs(loss - base))
    assert max(effects) > 1e-6, "the oracle must be able to fail"
    assert all(ablation._mapped), "every one of these models can be mapped"


@pytest.fixture(scope="module")
def trained():
    splits = cuq.load_splits("digits", reserve=False)
    torch.manual_seed(0)
    model = own("mlp", (1, 8, 8), widths=(24, 16))
    return cuq.finetune(model, splits, epochs=4, lr=0.05, batch_size=32).model.eval(), splits


def evidence_of(model, splits, seed=0) -> Evidence:
    return Evidence(model, splits.example(), splits, seed=seed)


def seen(evidence, count):
    images, labels = zip(*evidence.images("loss", count), strict=True)
    return torch.cat(images), torch.cat(labels)


def test_scores_are_the_change_of_the_loss(trained):
    model, splits = trained
    evidence = evidence_of(model, splits)
    groups = dependency_groups(model, evidence.example)
    images, labels = seen(evidence, 300)
    base = cross_entropy(model, images, labels)
    for group, scores in zip(groups, Loss(images=300).scores(groups, evidence), strict=True):
        wanted = [cross_entropy(hidden(model, group, [c]), images, labels) - base for c in range(group.channels)]
        assert scores.dtype == torch.float64
        assert scores.tolist() == pytest.approx(wanted, abs=1e-5)


def test_what_is_gone_already_stays_gone(trained):
    model, splits = trained
    images, labels = seen(evidence_of(model, splits), 100)
    groups = dependency_groups(model, images[:1])
    got = Ablation(model, groups, images, labels).without(1, torch.tensor([[4, 6], [0, 1]]), [[3, 8], [2]])
    for loss, choice in zip(got.loss.tolist(), ([2, 4, 6], [0, 1, 2]), strict=True):
        slow = taken_out(taken_out(model, images[:1], 0, [3, 8]), images[:1], 1, choice)
        assert loss == pytest.approx(cross_entropy(slow, images, labels), abs=1e-5)


def test_accuracy_of_each_class(trained):
    model, splits = trained
    images, labels = seen(evidence_of(model, splits), 200)
    images, labels = images[labels != 7], labels[labels != 7]
    groups = dependency_groups(model, images[:1])
    answers = Ablation(model, groups, images, labels).without(0, torch.tensor([[5]]), [[], []])
    got, right = answers.class_accuracy[0], hidden(model, groups[0], [5])(images).argmax(1) == labels
    assert answers.accuracy.item() == pytest.approx(right.double().mean().item())
    for label in range(10):
        wanted = right[labels == label].double().mean().item()
        assert got[label].item() == pytest.approx(wanted, nan_ok=True)
    assert got[7].isnan()


def image_norms():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.GroupNorm(4, 12), nn.ReLU(), nn.Conv2d(12, 12, 1), LayerNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def vision_transformer():
    return torchvision.models.VisionTransformer(32, 16, 2, 2, 16, 24, num_classes=4)


def swin(version):
    block = torchvision.models.swin_transformer
    kinds = {"block": block.SwinTransformerBlockV2, "downsample_layer": block.PatchMergingV2} if version == 2 else {}
    return torchvision.models.SwinTransformer([2, 2], 8, [2, 2], [2, 2], [4, 4], num_classes=4, **kinds)


TOKENS = {"norms": image_norms, "vit": vision_transformer, "swin": lambda: swin(1), "swin v2": lambda: swin(2)}


@pytest.mark.parametrize("name", TOKENS)
def test_leaving_out_across_norms_and_attention_equals_removing(name):
    model = randomise_all(TOKENS[name]()).double()
    images, labels = torch.randn(4, 3, 32, 32).double(), torch.tensor([0, 1, 2, 3])
    groups = dependency_groups(model, images[:1])
    ablation = Ablation(model, groups, images, labels)
    nothing = [[] for _ in groups]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    effects = []
    for place, group in enumerate(groups):
        part = group.channels // group.divisions
        first, second = (torch.arange(group.divisions) * part + i for i in (1, 2))
        gone = [*nothing[:place], first.tolist(), *nothing[place + 1 :]]
        slow = taken_out(model, images[:1], place, [*first.tolist(), *second.tolist()])
        wanted = cross_entropy(slow, images, labels)
        assert ablation.without(place, second.unsqueeze(0), gone).loss.item() == pytest.approx(wanted, abs=1e-12)
        gone[place] = [*first.tolist(), *second.tolist()]
        assert ablation.base(gone).loss.item() == pytest.approx(wanted, abs=1e-12)
        effects.append(abs(wanted - ablation.base(nothing).loss.item()))
    assert sorted(effects)[len(effects) // 2] > 1e-6, "the oracle must be able to fail"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Branching(nn.Module):
    """Forward depends on the values, which cannot be mapped."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = self.a(x.flatten(1)).relu()
        return self.b(x) if x.sum() > 0 else self.b(-x)


class Borrowed(nn.Module):
    """Uses a layer's weights without calling the layer."""

    def __init__(self, layer):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 12, 1), layer

    def forward(self, x):
        x = self.a(x).relu()
        if isinstance(self.b, nn.Linear):
            return F.linear(x.mean((2, 3)), self.b.weight, self.b.bias)
        return F.conv2d(x, self.b.weight, self.b.bias).mean((2, 3))


def test_models_that_cannot_be_mapped_are_taken_one_by_one():
    model, images, labels = Branching().eval(), torch.randn(6, 1, 2, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    groups = dependency_groups(model, images[:1])
    got = Ablation(model, groups, images, labels).without(0, torch.arange(12).unsqueeze(1), [[]]).loss.tolist()
    assert got == pytest.approx([cross_entropy(hidden(model, groups[0], [c]), images, labels) for c in range(12)])


def borrowing(layer):
    model, images = Borrowed(layer).eval(), torch.randn(6, 1, 2, 4)
    layers = [("a", model.a, "out"), ("b", model.b, "in")]
    coupled = tuple(CoupledLayer(*layer, torch.arange(12), torch.arange(12)) for layer in layers)
    return model, Group("a", 12, coupled, 1, lambda channels: None), images, torch.tensor([0, 1, 2, 0, 1, 2])


def test_weights_used_without_calling_the_layer():
    model, group, images, labels = borrowing(nn.Linear(12, 3))
    got = Ablation(model, [group], images, labels).without(0, torch.arange(12).unsqueeze(1), [[]]).loss.tolist()
    assert got == pytest.approx([cross_entropy(hidden(model, group, [c]), images, labels) for c in range(12)])
    assert len(set(got)) > 6
    model, group, images, labels = borrowing(nn.Conv2d(12, 3, 1))
    with pytest.raises(PruningError, match="cannot be hidden from b"):
        Ablation(model, [group], images, labels)


# The searches, channel by channel: each takes how bad a model is without some channels of its one group.


def slow_exhaustive(bad, width, slack):
    gone, best = [], bad([])
    while len(gone) < width - 1:
        value, channel = min((bad([*gone, c]), c) for c in range(width) if c not in gone)
        if value > best + slack:
            break
        gone.append(channel)
        best = min(best, value)
    return sorted(gone)


def slow_greedy(bad, width, slack, ignore):
    gone, best, waiting, taken = [], bad([]), list(range(width)), True
    while taken:
        taken, refused = False, []
        for channel in waiting:
            value = bad([*gone, channel])
            if value > best + slack or len(gone) == width - 1:
                refused.append((channel, value))
                continue
            gone, best, taken = [*gone, channel], min(best, value), True
        waiting = [c for c, value in refused if value <= best + ignore]
    return sorted(gone)


def slow_random(bad, steps, slack):
    gone, best = [], bad([])
    for step in steps:
        value = bad([*gone, *step])
        if value <= best + slack:
            gone, best = [*gone, *step], min(best, value)
    return sorted(gone)


@pytest.fixture(scope="module")
def one_layer():
    """A trained layer of 24, some of it useless: its groups, evidence, and the loss without some channels."""
    splits = cuq.load_splits("digits", reserve=False)
    torch.manual_seed(1)
    model = own("mlp", (1, 8, 8), widths=(24,))
    model = cuq.finetune(model, splits, epochs=4, lr=0.05, batch_size=32).model.double().eval()
    with torch.no_grad():
        model[1].weight[[2, 5]], model[1].bias[[2, 5]] = 0, 0
    evidence = Evidence(model, splits.example().double(), splits, seed=3)
    images, labels = seen(evidence, 400)
    (group,) = groups = dependency_groups(model, images[:1])
    return groups, evidence, lambda channels: cross_entropy(hidden(model, group, channels), images, labels)


@pytest.mark.parametrize("tolerance", [0.0, 0.05])
def test_searches_equal_their_slow_forms(one_layer, tolerance):
    groups, evidence, bad = one_layer
    base = bad([])
    slack = tolerance * base + 1e-12

    def found(**options):
        return Loss(images=400, tolerance=tolerance + 1e-12, **options).choose(groups, evidence, None)[0]

    alone = {c: bad([c]) for c in range(24)}
    precomputed = sorted(c for c in alone if alone[c] <= base + slack)
    exhaustive = slow_exhaustive(bad, 24, slack)
    greedy = slow_greedy(bad, 24, slack, 0.1 * base)
    assert {2, 5} <= set(precomputed) & set(exhaustive) & set(greedy)
    assert len(exhaustive) >= 3
    assert found() == precomputed
    assert found(mode="exhaustive") == exhaustive
    assert found(mode="greedy") == greedy
    assert bad(exhaustive) <= min(base, bad([2, 5])) + slack
    generator = torch.Generator().manual_seed(3)
    parts = torch.randperm(24, generator=generator).split(1)
    steps = [parts[i].tolist() for i in torch.randperm(24, generator=generator)]
    assert found(mode="random") == slow_random(bad, steps, slack)
    several = found(mode="random", step=5)
    assert len(several) in (0, 4, 5, 9, 10, 14, 15, 19, 20)
    assert bad(several) <= base + slack
    assert bad(found(mode="exhaustive", step=4)) <= base + slack


@pytest.mark.parametrize("measure", ["loss", "worst-class-accuracy"])
@pytest.mark.parametrize("mode", ["precomputed", "exhaustive", "greedy", "random"])
def test_counts_are_reached(trained, mode, measure):
    model, splits = trained
    evidence = evidence_of(model, splits)
    groups = dependency_groups(model, evidence.example)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chosen = Loss(mode=mode, measure=measure, images=150, step=3).choose(groups, evidence, [9, 0])
    assert [len(set(c)) for c in chosen] == [9, 0]
    assert chosen[0] == sorted(chosen[0])
    for option in (None, [0, 14]):
        sizes = [len(c) for c in Loss(mode=mode, measure=measure, images=150).choose(groups, evidence, option)]
        assert all(size < group.channels for size, group in zip(sizes, groups, strict=True))
        assert option is None or sizes == option
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_worst_class_accuracy_orders_by_it_and_then_by_the_loss(one_layer):
    groups, evidence, bad = one_layer
    model, (images, labels) = evidence.model, seen(evidence, 400)

    def error(channels):
        right = hidden(model, groups[0], channels)(images).argmax(1) == labels
        return 1 - min(right[labels == label].double().mean().item() for label in labels.unique())

    scores = Loss(images=400, measure="worst-class-accuracy").scores(groups, evidence)[0]
    assert scores.tolist() == pytest.approx([error([c]) - error([]) for c in range(24)], abs=1e-9)
    order = sorted(range(24), key=lambda c: (round(error([c]), 9), bad([c])))
    assert scores[order].diff().min() >= 0
    assert len({round(error([c]), 9) for c in range(24)}) < 24, "there must be ties"


def test_parts_of_grouped_convolutions_go_together():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    splits = cuq.load_splits("digits", reserve=False)
    evidence = evidence_of(model.eval(), splits)
    groups = [g for g in dependency_groups(model, evidence.example) if g.divisions == 2]
    assert groups
    for mode in ("precomputed", "exhaustive", "greedy", "random"):
        found = Loss(mode=mode, images=60).choose(groups, evidence, [4] * len(groups))
        for chosen, group in zip(found, groups, strict=True):
            assert [c + group.channels // 2 for c in chosen[:2]] == chosen[2:]
    scores = Loss(images=60).scores(groups, evidence)[0]
    assert torch.equal(scores[:4], scores[4:])


def test_classes_of_importance():
    changes = torch.tensor([0.5, 0.011, 0.01, 0.0, -0.01, -0.2])
    assert importance_classes(changes, 0.01) == {"important": 2, "zero": 3, "worse": 1}


def test_a_layer_is_never_emptied():
    model = own("mlp", (1, 8, 8), widths=(6,))
    nn.init.zeros_(model[3].weight)
    evidence = evidence_of(model.eval(), cuq.load_splits("digits", reserve=False))
    groups = dependency_groups(model, evidence.example)
    for mode in ("precomputed", "exhaustive", "greedy", "random"):
        assert len(Loss(mode=mode, images=20).choose(groups, evidence, None)[0]) == 5


def test_refused():
    with pytest.raises(UnknownNameError, match="did you mean 'greedy'"):
        Loss(mode="gredy")
    with pytest.raises(UnknownNameError, match="measure of criterion 'loss'"):
        Loss(measure="accuracy")
    for options in ({"images": 0}, {"step": 0}, {"tolerance": -1.0}, {"tolerance": 0.2, "ignore": 0.1}):
        with pytest.raises(PruningError, match="expected"):
            Loss(**options)
    model = own("mlp", (1, 8, 8), widths=(8,)).eval()
    splits = cuq.load_splits("digits", reserve=False)
    groups = dependency_groups(model, splits.example())
    with pytest.raises(PruningError, match="looks at training images"):
        Loss().scores(groups, Evidence(model, splits.example()))
    images = torch.utils.data.TensorDataset(torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 10, 2]))
    with pytest.raises(DataError, match="out of range"):
        Loss().scores(groups, evidence_of(model, Splits(train=images)))


def test_the_data_decide_the_size_of_a_pruned_model(trained):
    model, splits = trained
    result = cuq.prune(model, splits=splits, example_inputs=splits.example(), criterion=Loss(mode="greedy", images=400))
    assert 0 < result.sparsity < 1
    images, labels = seen(evidence_of(model, splits), 400)
    base = cross_entropy(model, images, labels)
    assert cross_entropy(result.model, images, labels) <= base * 1.001 + 1e-6
    half = cuq.prune(model, splits.example(), splits=splits, criterion="loss", sparsity=0.5, round_to=1)
    assert [layer.after for layer in half.layers] == [layer.before // 2 for layer in half.layers]
