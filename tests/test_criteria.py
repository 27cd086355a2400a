"""Criteria that score filters: against torch-pruning, torch.func, finite differences, loops and hand-computed values."""

import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import compress_uq as cuq
from compress_uq.errors import DataError, PruningError, UnknownNameError
from compress_uq.pruning.criteria.criterion import Evidence
from compress_uq.pruning.criteria.fpgm import FPGM
from compress_uq.pruning.criteria.hessian import Hessian
from compress_uq.pruning.criteria.hrank import HRank
from compress_uq.pruning.criteria.l1 import L1
from compress_uq.pruning.criteria.l2 import L2
from compress_uq.pruning.criteria.lamp import LAMP
from compress_uq.pruning.criteria.measured import filter_sums
from compress_uq.pruning.criteria.random import Random
from compress_uq.pruning.criteria.ranks import matrix_ranks
from compress_uq.pruning.criteria.taylor import Taylor
from compress_uq.pruning.graph.groups import dependency_groups, filters
from small_models import Concat, own, randomise

MEASURED = [Taylor(images=12), Hessian(images=12), HRank(images=12)]
IDS = [criterion.name for criterion in MEASURED]


class Residual(nn.Module):
    """A residual block and an inner layer, of which the test sees the maps that the HRank authors' code hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv1, self.bn1 = nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.fc1, self.fc2 = nn.Linear(6, 7), nn.Linear(7, 3)
        self.seen = {}

    def forward(self, x):
        x = self.seen["stem"] = F.relu(self.bn0(self.stem(x)))
        y = self.seen["conv1"] = F.relu(self.bn1(self.conv1(x)))
        x = self.seen["conv2"] = F.relu_(self.bn2(self.conv2(y)) + x)
        x = self.seen["fc1"] = F.relu(self.fc1(F.max_pool2d(x, 8).flatten(1)))
        return self.fc2(x + 1)


def tiny():
    """Three groups of one scored layer each, in float64."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 2), nn.Tanh(), nn.Flatten(),
        nn.Linear(54, 5), nn.ReLU(), nn.Linear(5, 3),
    ).double()  # fmt: skip


def evidence(model, shape=(1, 6, 6), count=12, dtype=torch.float64, **options):
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, *shape, generator=generator, dtype=dtype)
    splits = cuq.Splits(train=TensorDataset(images, torch.arange(count) % 3))
    return Evidence(randomise(model), images[:1], splits, **options)


def everything(seen):
    """All training images and labels at once, as the model sees them."""
    images, labels = zip(*seen.splits.train, strict=True)
    return torch.stack(images).to(torch.float32).to(seen.example), torch.tensor([int(label) for label in labels])


def scores(criterion, seen):
    groups = dependency_groups(seen.model, seen.example)
    return {group.name: score for group, score in zip(groups, criterion.scores(groups, seen), strict=True)}


def shares(values):
    return values / values.mean()


@pytest.mark.parametrize(
    ("ours", "theirs", "power"),
    [
        (L1(), tp.importance.MagnitudeImportance(p=1, group_reduction="first", normalizer=None), 1),
        (L2(), tp.importance.MagnitudeImportance(p=2, group_reduction="first", normalizer=None), 0.5),
        (LAMP(), tp.importance.LAMPImportance(p=2, group_reduction="first"), 1),
        (FPGM(), tp.importance.FPGMImportance(p=1, group_reduction="first", normalizer=None), 1),
    ],
    ids=["l1", "l2", "lamp", "fpgm"],
)
def test_weight_criteria_equal_torch_pruning(ours, theirs, power):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 4))
    example = torch.randn(1, 3, 8, 8)
    for parameter in model.parameters():
        parameter.data.abs_()  # theirs takes distances between absolute weights
    got = scores(ours, Evidence(model, example))
    graph = tp.DependencyGraph().build_dependency(model, example)
    for name in ("0", "2"):
        group = graph.get_pruning_group(model[int(name)], tp.prune_conv_out_channels, list(range(len(got[name]))))
        expected = theirs(group).double() ** power
        assert torch.allclose(got[name], expected if ours.name == "lamp" else shares(expected), rtol=1e-5), name


def line(values):
    """One group, whose filters are single weights of these sizes."""
    model = nn.Sequential(nn.Conv2d(1, len(values), 1, bias=False), nn.Flatten(), nn.Linear(len(values), 2)).double()
    model[0].weight.data = torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)
    return Evidence(model, torch.zeros(1, 1, 1, 1, dtype=torch.float64))


def test_scores_by_hand():
    assert scores(FPGM(), line([0, 3, 4]))["0"].tolist() == pytest.approx((torch.tensor([7, 4, 5]) * 3 / 16).tolist())
    assert scores(FPGM(), line([-2, 2, 0]))["0"].argmin() == 2, "the geometric median, not the smallest norm"
    assert scores(FPGM(), line([-2, 0, 5]))["0"].argmin() == 1
    assert scores(LAMP(), line([1, -2, 3, 2]))["0"].tolist() == pytest.approx([1 / 18, 4 / 17, 1, 4 / 17])
    assert scores(LAMP(), line([0, 0]))["0"].tolist() == [0, 0]
    assert scores(L2(), line([-3, 1]))["0"].tolist() == pytest.approx([1.5, 0.5])


def test_random_is_uniform_and_follows_the_seed_alone():
    model = own("mlp", (1, 8, 8), widths=(4000, 8))
    first, state = scores(Random(), evidence(model, (1, 8, 8), dtype=torch.float32)), torch.get_rng_state()
    torch.rand(5)
    again = scores(Random(), evidence(model, (1, 8, 8), dtype=torch.float32))
    other = scores(Random(), evidence(model, (1, 8, 8), dtype=torch.float32, seed=1))
    assert torch.equal(scores(Random(), Evidence(model, torch.zeros(1, 1, 8, 8)))["1"], first["1"])
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["1"], other["1"])
    counts = torch.histc(first["1"], 10, 0, 1)
    assert ((counts - 400).abs() < 4 * (4000 * 0.09) ** 0.5).all()
    assert len(state)


def test_taylor_is_the_derivative_by_a_filters_scale():
    """Its square; by central differences, batch by batch."""
    seen = evidence(tiny(), training=cuq.TrainingConfig(batch_size=5))
    got = scores(Taylor(images=12), seen)
    batches = list(seen.images("taylor", 12, 5))
    assert [len(labels) for _, labels in batches] == [5, 5, 2]

    @torch.no_grad()
    def derivative(weight, channel, images, labels, step=1e-5):
        losses = []
        for scale in (1 + step, 1 - step):
            kept = weight.clone()
            weight[channel] *= scale
            losses.append(F.cross_entropy(seen.model(images), labels).item())
            weight.copy_(kept)
        return (losses[0] - losses[1]) / (2 * step)

    for name in ("0", "3", "6"):
        weight = seen.model[int(name)].weight
        expected = [
            sum(len(labels) * derivative(weight, channel, images, labels) ** 2 for images, labels in batches) / 12
            for channel in range(len(weight))
        ]
        assert got[name].tolist() == pytest.approx(expected, rel=1e-4), name


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, groups=2), nn.Linear(4, 3)], ids=["conv", "linear"])
def test_sums_over_filters_are_by_output(layer):
    assert torch.allclose(filter_sums(layer, layer.weight), filters(layer).sum(1))


def test_sums_over_filters_of_transposed_convolutions_are_by_output():
    layer = nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False).double()
    expected = layer(torch.ones(1, 4, 1, 1, dtype=torch.float64)).sum((0, 2, 3))
    assert torch.allclose(filter_sums(layer, layer.weight), expected)


def test_taylor_equals_torch_pruning():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(24, 3))
    seen = evidence(model, dtype=torch.float32)
    got = scores(Taylor(images=12), seen)
    F.cross_entropy(model(everything(seen)[0]), everything(seen)[1]).backward()
    graph = tp.DependencyGraph().build_dependency(model, seen.example)
    importance = tp.importance.TaylorImportance(group_reduction="first", normalizer=None, multivariable=True)
    for name in ("0", "2"):
        group = graph.get_pruning_group(model[int(name)], tp.prune_conv_out_channels, list(range(len(got[name]))))
        assert torch.allclose(got[name], importance(group).double() ** 2, rtol=1e-4), name


def test_hessian_tends_to_the_diagonal_of_torch_func():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    seen = evidence(model.double(), (1, 2, 2), training=cuq.TrainingConfig(batch_size=5))
    images, labels = everything(seen)

    def diagonal(name):
        def loss(flat):
            weights = {name: flat.view_as(model.get_parameter(name))}
            return F.cross_entropy(torch.func.functional_call(model, weights, (images,)), labels)

        weight = model.get_parameter(name).detach()
        second = torch.func.hessian(loss)(weight.flatten()).diagonal().view_as(weight)
        return (second * weight.square() / 2).sum(1)

    runs = [scores(Hessian(images=12, probes=50), Evidence(model, images[:1], seen.splits, seen.training, seed=seed))
            for seed in range(12)]  # fmt: skip
    for name in ("1", "3"):
        draws = torch.stack([run[name] for run in runs])
        exact, spread = diagonal(f"{name}.weight"), draws.std(0) / len(runs) ** 0.5
        assert ((draws.mean(0) - exact).abs() < 5 * spread + 1e-5 * exact.abs().max()).all()
        assert spread.max() < 0.15 * exact.abs().max(), "the test must be able to fail"


def loop_ranks(maps):
    return torch.tensor([[torch.linalg.matrix_rank(channel).item() for channel in image] for image in maps])


def test_hrank_takes_maps_after_norm_sum_and_activation():
    torch.manual_seed(0)
    model = Residual()
    seen = evidence(model, (3, 8, 8), dtype=torch.float32, training=cuq.TrainingConfig(batch_size=8))
    got = scores(HRank(images=12), seen)
    model(everything(seen)[0])
    ranks = {name: loop_ranks(model.seen[name]).double().mean(0) for name in ("stem", "conv1", "conv2")}
    stream = (shares(ranks["stem"]) + shares(ranks["conv2"])) / 2
    assert torch.allclose(next(v for k, v in got.items() if k in ("stem", "conv2")), stream)
    assert torch.allclose(got["conv1"], shares(ranks["conv1"]))
    active = (model.seen["fc1"] != 0).double().mean(0)
    assert torch.allclose(got["fc1"], shares(active))
    assert ranks["conv1"].unique().numel() > 1


def test_hrank_follows_a_concatenation():
    torch.manual_seed(0)
    model = Concat()
    seen = evidence(model, (3, 8, 8), dtype=torch.float32)
    maps = []
    model.c.register_forward_pre_hook(lambda _layer, inputs: maps.append(inputs[0].detach()))
    got = scores(HRank(images=12, reduction="first"), seen)
    maps.clear()
    model(everything(seen)[0])
    ranks = loop_ranks(maps[0]).double().mean(0)
    assert torch.allclose(got["a"], shares(ranks[:16]))
    assert torch.allclose(got["b"], shares(ranks[16:]))


@pytest.mark.parametrize(
    "shape", [(1, 1), (2, 2), (4, 4), (5, 5), (7, 7), (8, 8), (5, 12), (12, 5), (32, 32), (48, 50)]
)
def test_ranks_are_those_of_the_loop(shape):
    generator = torch.Generator().manual_seed(sum(shape))
    count, least = 120, min(shape)
    dense = torch.randn(count, *shape, generator=generator)
    sparse = dense * (torch.rand(count, *shape, generator=generator) < torch.rand(count, 1, 1, generator=generator))
    left = torch.linalg.qr(torch.randn(count, shape[0], least, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(count, shape[1], least, generator=generator))[0]
    tolerance = max(shape) * torch.finfo(torch.float32).eps
    values = tolerance * 4 ** torch.randn(count, 1, least, generator=generator)  # singular values about the tolerance
    values[..., 0] = 1
    near = (left * values) @ right.mT
    low = (left[..., : least // 2]) @ right[..., : least // 2].mT
    matrices = torch.cat([dense, dense.relu(), sparse, near, 1e-20 * near, low, torch.zeros(3, *shape)])
    expected = torch.stack([torch.linalg.matrix_rank(matrix) for matrix in matrices])
    assert torch.equal(matrix_ranks(matrices), expected)
    assert torch.equal(matrix_ranks(sparse.double()), torch.linalg.matrix_rank(sparse.double()))
    assert least == 1 or expected.unique().numel() > 2


def test_ranks_of_real_feature_maps(real_data):
    weights = real_data / "weights" / "cifar10_resnet20-12fca82f.th"
    model = cuq.load_model(weights, arch="compress-uq:resnet20").eval()
    images = F.interpolate(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), 32, mode="bilinear")
    maps = []
    for layer in (model.layer1[2], model.layer2[0], model.layer3[2]):
        layer.register_forward_hook(lambda _layer, _inputs, output: maps.append(output.detach()))
    model(images)
    for found in maps:
        assert torch.equal(matrix_ranks(found.flatten(0, 1)).view(4, -1), loop_ranks(found))


@pytest.mark.parametrize("criterion", MEASURED, ids=IDS)
def test_the_model_is_left_alone_and_frozen_weights_are_scored(criterion):
    seen = evidence(tiny(), (1, 6, 6))
    groups = dependency_groups(seen.model, seen.example)
    free = criterion.scores(groups, seen)
    seen.model.train()
    seen.model[0].eval()
    seen.model.requires_grad_(False)
    seen.model[6].weight.grad = torch.ones_like(seen.model[6].weight)
    before = {name: value.clone() for name, value in seen.model.state_dict().items()}
    with torch.no_grad():
        frozen = criterion.scores(groups, seen)
    assert all(torch.equal(a, b) for a, b in zip(free, frozen, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in seen.model.state_dict().items())
    assert [module.training for module in seen.model] == [False] + [True] * 8
    assert not any(parameter.requires_grad for parameter in seen.model.parameters())
    assert (seen.model[6].weight.grad == 1).all()
    assert [name for name, p in seen.model.named_parameters() if p.grad is not None] == ["6.weight"]
    assert not any(module._forward_hooks for module in seen.model)
    assert all(
        score.dtype == torch.float64 and score.shape == (g.channels,) for g, score in zip(groups, free, strict=True)
    )


@pytest.mark.parametrize("criterion", MEASURED, ids=IDS)
def test_a_dead_filter_scores_zero(criterion):
    model = tiny()
    for layer in (model[0], model[6]):
        layer.weight.data[1], layer.bias.data[1] = 0, 0
    seen = evidence(model)
    model[1].bias.data[1], model[1].running_mean[1] = 0, 0
    got = scores(criterion, seen)
    for name in ("0", "6"):
        assert got[name][1] == 0, name
        assert (got[name] != 0).any(), name


def test_a_group_sums_its_layers_as_asked():
    torch.manual_seed(0)
    model = Residual()
    seen = evidence(model, (3, 8, 8), dtype=torch.float32)
    images, labels = everything(seen)
    loss = F.cross_entropy(model(images), labels)
    layers = [model.stem, model.conv2]
    slopes = torch.autograd.grad(loss, [layer.weight for layer in layers])
    rows = [(g * layer.weight).flatten(1).sum(1).square().double() for g, layer in zip(slopes, layers, strict=True)]
    expected = {"sum": sum(rows), "mean": sum(rows) / 2, "max": torch.stack(rows).amax(0)}
    for reduction, values in expected.items():
        got = scores(Taylor(images=12, reduction=reduction), seen)
        assert torch.allclose(next(v for k, v in got.items() if k in ("stem", "conv2")), values, rtol=1e-3), reduction
    with pytest.raises(UnknownNameError, match="'median'"):
        Taylor(images=12, reduction="median")


class CutOff(nn.Module):
    """Its second layer is outside the loss's reach."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(36, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.detached = False

    def forward(self, x):
        x = self.b(self.a(x.flatten(1)))
        return self.c(x.detach() if self.detached else x)


@pytest.mark.parametrize("criterion", MEASURED[:2], ids=IDS[:2])
def test_a_missing_gradient_names_the_layer(criterion):
    seen = evidence(CutOff().double())
    groups = dependency_groups(seen.model, seen.example)
    seen.model.detached = True
    with pytest.raises(PruningError, match=r"by the weight of (a|b), and there is none"):
        criterion.scores(groups, seen)
    with pytest.raises(PruningError, match=r"by the weight of b, and there is none"):
        criterion.scores([group for group in groups if group.name == "b"], seen)


@pytest.mark.parametrize("criterion", MEASURED, ids=IDS)
def test_what_is_missing_is_said(criterion):
    model = tiny()
    with pytest.raises(PruningError, match=f"{criterion.name!r} looks at training images"):
        scores(criterion, Evidence(model, torch.zeros(1, 1, 6, 6, dtype=torch.float64)))
    with pytest.raises(PruningError, match="images=0: expected 1 or more"):
        scores(type(criterion)(images=0), evidence(model))


def test_bad_options_labels_and_maps():
    with pytest.raises(PruningError, match="probes=0: expected 1 or more"):
        scores(Hessian(images=12, probes=0), evidence(tiny()))
    seen = evidence(tiny())
    wrong = cuq.Splits(train=TensorDataset(seen.splits.train.tensors[0], torch.full((12,), 3)))
    with pytest.raises(DataError, match="label 3 is out of range"):
        scores(Taylor(images=12), Evidence(seen.model, seen.example, wrong))
    seen.model[6].bias.data[2] = torch.inf
    with pytest.raises(PruningError, match="the feature maps of 6 are not finite"):
        scores(HRank(images=12), seen)


def test_hrank_refuses_to_choose_among_equal_ranks():
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Sigmoid(), nn.Linear(16, 3))
    seen = evidence(model, dtype=torch.float32)
    with pytest.raises(PruningError, match="gives all 16 channels of 1 the score 1: it cannot choose"):
        cuq.prune(model, seen.example, sparsity=0.5, criterion=HRank(images=12), splits=seen.splits)


@pytest.mark.parametrize("criterion", ["random", "l2", "fpgm", "lamp", "taylor", "hessian", "hrank"])
def test_pruning_by_name(criterion):
    seen = evidence(own("cnn", (1, 16, 16), widths=(16, 16), hidden=(16,)), (1, 16, 16), dtype=torch.float32)
    result = cuq.prune(seen.model, seen.example, sparsity=0.5, criterion=criterion, splits=seen.splits)
    assert result.after.macs < 0.6 * result.before.macs
    assert all(layer.after == 8 for layer in result.layers)


def test_progress_counts_the_batches():
    steps = []
    seen = evidence(tiny(), training=cuq.TrainingConfig(batch_size=5), progress=steps.append)
    scores(Taylor(images=12), seen)
    assert [(p.stage, p.step, p.steps) for p in steps] == [("pruning by taylor", n, 3) for n in (1, 2, 3)]
