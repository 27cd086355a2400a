"""ResRep and batch-norm scales: what their training does to weights, and that the folded model answers the same."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import compress_uq as cuq
from compress_uq.config import TrainingConfig
from compress_uq.cost import count_macs
from compress_uq.errors import InputError, PruningError, UnknownNameError
from compress_uq.pruning.amounts import sparsity_counts
from compress_uq.pruning.criteria.bn import BatchNormScale
from compress_uq.pruning.criteria.compactor import Compactors
from compress_uq.pruning.criteria.criterion import Evidence
from compress_uq.pruning.criteria.resrep import ResRep
from compress_uq.pruning.graph.groups import dependency_groups
from small_models import SMALL, Concat, ConvHead, InnerDropout, Leaves, own, randomise, torchvision


class Depthwise(nn.Module):
    """Expansion, depthwise and grouped convolutions, a transposed one, and a stream around them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.ConvTranspose2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6())
        self.wide = nn.Sequential(nn.Conv2d(8, 24, 1), nn.BatchNorm2d(24), nn.ReLU6())
        self.deep = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.BatchNorm2d(24), nn.Hardswish())
        self.back = nn.Sequential(nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.grouped = nn.Conv2d(8, 16, 3, groups=4)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.back(self.deep(self.wide(x)))
        return self.head(F.relu(self.grouped(x)).mean((2, 3)))


class Between(nn.Module):
    """A given layer between two convolutions."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.second = nn.Conv2d(3, 8, 3), layer, nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(F.relu(self.second(self.layer(self.first(x)))).mean((2, 3)))


MODELS = {
    "mlp": lambda: (own("mlp", (1, 8, 8), widths=(24, 16)), (1, 8, 8)),
    "cnn": lambda: (own("cnn", (1, 8, 8), widths=(12, 12), hidden=(12,)), (1, 8, 8)),
    "resnet20": lambda: (own("resnet20", (1, 8, 8)), (1, 8, 8)),
    "projections": lambda: (torchvision("resnet18"), SMALL),
    "leaves": lambda: (Leaves(), SMALL),
    "stream without batch norm": lambda: (InnerDropout(), (3, 8, 8)),
    "conv head": lambda: (ConvHead(), (3, 8, 8)),
    "concat": lambda: (Concat(), (3, 8, 8)),
    "depthwise": lambda: (Depthwise(), (3, 8, 8)),
}


class Noise(torch.utils.data.Dataset):
    def __init__(self, shape, count=64):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(count, *shape, generator=generator)
        self.labels = torch.randint(0, 4, (count,), generator=generator).tolist()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]


def setting(model, shape, train=None, sparsity=0.4, **training):
    """Groups, channels to remove from each, and evidence for a short training on noise."""
    example = torch.randn(1, *shape)
    groups = dependency_groups(model, example)
    options = {"epochs": 1, "batch_size": 4, "lr": 0.01, "device": "cpu", **training}
    splits = cuq.Splits(train=train or Noise(shape))
    return (
        groups,
        sparsity_counts(groups, sparsity, 1),
        Evidence(model, example, splits, TrainingConfig(**options), "none"),
    )


@pytest.mark.parametrize("name", MODELS)
def test_channels_that_go_are_zero_for_all_that_read_them(name):
    model, shape = MODELS[name]()
    groups, counts, evidence = setting(randomise(model), shape)
    names = list(model.state_dict())
    chosen = ResRep().choose(groups, evidence, counts)
    assert [len(channels) for channels in chosen] == counts
    assert list(model.state_dict()) == names
    assert not any(module._forward_hooks for module in model.modules())
    model.double()
    images = torch.randn(3, *shape, dtype=torch.float64)
    with torch.no_grad():
        whole = model(images)
        for group, channels in zip(groups, chosen, strict=True):
            group.remove(channels)
        assert (model(images) - whole).abs().max() <= 1e-9 * whole.abs().max()
    other = randomise(MODELS[name]()[0]).double()
    wanted = other(images)
    for group, channels in zip(dependency_groups(other, images[:1]), chosen, strict=True):
        group.remove(channels)
    assert (other(images) - wanted).abs().max() > 1e-6 * wanted.abs().max(), "the check must be able to fail"


@pytest.mark.parametrize("name", MODELS)
def test_folding_changes_no_answer(name):
    model, shape = MODELS[name]()
    model = randomise(model).double()
    images = torch.randn(16, *shape, dtype=torch.float64)
    compactors = Compactors(model, images[:1], dependency_groups(model, images[:1]))
    for parameter in (p for n, p in model.named_parameters() if "compactor" in n):
        parameter.data += 0.3 * torch.randn_like(parameter)
    masks = [torch.rand(len(norm)) < 0.3 for norm in compactors.norms()]
    compactors.zero(masks)
    with torch.no_grad():
        wanted = model(images)
        compactors.fold(model, [images])
        assert (model(images) - wanted).abs().max() <= 1e-9 * wanted.abs().max()


def test_folded_batch_norm_still_normalises():
    model = randomise(own("cnn", (1, 8, 8), widths=(6, 6))).double()
    images = torch.randn(64, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():  # statistics as after training on these images
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.momentum = 1.0
        model.train()(images)
    model.eval()
    compactors = Compactors(model, images[:1], dependency_groups(model, images[:1]))
    for parameter in (p for n, p in model.named_parameters() if "compactor" in n):
        parameter.data += 0.3 * torch.randn_like(parameter)
    with torch.no_grad():
        compactors.fold(model, [images])
        z = model[0](images)
        assert torch.allclose(model[1].running_mean, z.mean((0, 2, 3)), atol=1e-9)
        assert torch.allclose(model[1].running_var, z.var((0, 2, 3), unbiased=False), atol=1e-9)


def test_one_step_by_hand():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    images = torch.randn(5, 1, 2, 2, dtype=torch.float64)
    compactors = Compactors(model, images, dependency_groups(model, images))
    weight = model[1].compactor.weight
    weight.data += 0.1 * torch.randn_like(weight)
    before = weight.detach().clone()
    compactors.mask([torch.tensor([False, True, False])])
    model(images).square().sum().backward()
    slope = weight.grad.clone()
    assert slope[1].abs().max() > 0
    compactors.step(lr=0.01, momentum=0.9, strength=0.2, push=0.7, fade=0.1)
    assert weight.grad is None
    lasso = before / before.norm(dim=1, keepdim=True)
    moved = before - 0.01 * (slope + 0.2 * lasso)
    moved[1] = before[1] - 0.01 * 0.7 * lasso[1]
    assert torch.allclose(weight, moved)
    compactors.step(lr=0.01, momentum=0.9, strength=0.0, push=0.7, fade=0.1)
    assert torch.allclose(weight[0], moved[0] - 0.01 * 0.9 * (slope + 0.2 * lasso)[0])
    compactors.step(lr=10.0, momentum=0.0, strength=0.0, push=0.7, fade=0.1)
    assert weight[1].abs().max() == 0, "a masked row stops at zero"


def test_rows_of_a_stream_are_judged_and_pushed_together():
    model = randomise(own("resnet20", (1, 8, 8))).double()
    example = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    groups = dependency_groups(model, example)
    compactors = Compactors(model, example, groups)
    makers = [model.bn1, *(block.bn2 for block in model.layer1)]
    weights = [norm.compactor.weight for norm in makers]
    for size, weight in enumerate(weights, 1):
        weight.data[3] *= size
    place = next(i for i, group in enumerate(groups) if group.name == "conv1")
    assert compactors.norms()[place][3] == pytest.approx(((1 + 4 + 9 + 16) / 4) ** 0.5)
    compactors.step(lr=1.0, momentum=0.0, strength=0.1, push=0.1, fade=0.1)
    length = ((1 + 4 + 9 + 16) / 4) ** 0.5
    for size, weight in enumerate(weights, 1):
        assert weight[3, 3].item() == pytest.approx(size * (1 - 0.1 / length))


def test_forgetting_leaves_the_rest_as_it_was(dense, splits, caplog):
    model = copy.deepcopy(dense.model).eval()
    groups, counts, evidence = setting(model, (1, 8, 8), splits.train, 0.5, epochs=6, batch_size=32, lr=0.02)
    images = torch.stack([splits.test[i][0] for i in range(len(splits.test))])
    labels = torch.tensor([splits.test[i][1] for i in range(len(splits.test))])
    first = (model(images).argmax(1) == labels).float().mean()
    with caplog.at_level(logging.INFO, "compress_uq"):
        chosen = ResRep().choose(groups, evidence, counts)
    last = (model(images).argmax(1) == labels).float().mean()
    assert float(caplog.text.partition("had length ")[2].partition(",")[0]) < 0.01
    assert last > first - 0.02, "with half the channels gone and no training after it"
    assert sum(map(len, chosen)) == sum(counts)


def test_a_resumed_run_ends_as_an_uninterrupted_one(dense, splits, tmp_path):
    def run(checkpoint, progress):
        model = copy.deepcopy(dense.model).eval()
        groups, counts, evidence = setting(model, (1, 8, 8), splits.train, 0.5, epochs=3, batch_size=64, lr=0.02)
        evidence = Evidence(
            **{**vars(evidence), "checkpoint": checkpoint, "progress": progress, "training": evidence.training}
        )
        return ResRep().choose(groups, evidence, counts), model.state_dict()

    def stop(progress):
        if progress.step > 0.5 * progress.steps:
            raise KeyboardInterrupt

    wanted, weights = run(None, lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "state.pt", stop)
    assert (tmp_path / "state.pt").is_file()
    steps = []
    chosen, resumed = run(tmp_path / "state.pt", lambda progress: steps.append(progress.step))
    assert steps[0] > 1, "it went on, and did not start anew"
    assert chosen == wanted
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)


def test_a_share_of_one_leaves_no_fine_tuning(dense, splits):
    stages = []
    made = cuq.compress(
        dense.model, splits, sparsity=0.5, uq="msp", criterion=ResRep(share=1), epochs=2, batch_size=64, distillation_weight=0.0,
        progress=lambda p: stages.append(p.stage),
    )  # fmt: skip
    assert "pruning by resrep" in stages
    assert "fine-tuning" not in stages
    card = made.report.to_json()
    assert card["compressed"]["cost"]["parameters"] < card["dense"]["cost"]["parameters"]
    with pytest.raises(InputError, match="no epoch is left"):
        cuq.plan_compression(dense.model, splits, sparsity=0.5, uq="tradi", criterion=ResRep(share=1), epochs=2)


def test_inner_layers_only():
    model = randomise(own("resnet20", (1, 8, 8)))
    groups, counts, evidence = setting(model, (1, 8, 8))
    chosen = ResRep(inner=True).choose(groups, evidence, counts)
    for group, channels, count in zip(groups, chosen, counts, strict=True):
        assert len(channels) == (count if group.name.endswith(".conv1") else 0), group.name


@pytest.mark.parametrize("inner", [False, True])
def test_a_budget_of_multiply_accumulates(inner):
    model = randomise(own("resnet20", (1, 8, 8)))
    groups, counts, evidence = setting(model, (1, 8, 8), sparsity=0.3)
    uniform = copy.deepcopy(model)
    for group, count in zip(dependency_groups(uniform, evidence.example), counts, strict=True):
        group.remove(range(count))
    dense = count_macs(model, evidence.example)
    chosen = ResRep(budget="macs", inner=inner).choose(groups, evidence, counts)
    for group, channels in zip(groups, chosen, strict=True):
        group.remove(channels)
    assert [len(channels) for channels in chosen] != counts
    wanted, reached = count_macs(uniform, evidence.example), count_macs(model, evidence.example)
    assert wanted - 0.02 * dense < reached <= wanted


@pytest.mark.parametrize("layer", [nn.Sigmoid(), nn.GroupNorm(1, 8)])
def test_layers_in_the_way_of_exact_removal_are_named(layer):
    model = Between(layer)
    groups, counts, evidence = setting(randomise(model), (3, 8, 8))
    with pytest.raises(PruningError, match="first cannot be trained to zero: second would still read"):
        ResRep().choose(groups, evidence, counts)
    assert not any("compactor" in name for name in model.state_dict())


def test_batch_norm_without_factors_is_refused():
    groups, counts, evidence = setting(Between(nn.BatchNorm2d(8, affine=False)).eval(), (3, 8, 8))
    with pytest.raises(PruningError, match="batch norm layer has no factors"):
        ResRep().choose(groups, evidence, counts)


def test_what_resrep_refuses():
    with pytest.raises(InputError, match="strength=0"):
        ResRep(strength=0)
    with pytest.raises(InputError, match="warmup=0.5, growth=0.4"):
        ResRep(warmup=0.5)
    with pytest.raises(InputError, match="momentum=1"):
        ResRep(momentum=1)
    with pytest.raises(InputError, match="interval=0"):
        ResRep(interval=0)
    with pytest.raises(InputError, match="share=0"):
        ResRep(share=0)
    with pytest.raises(UnknownNameError, match="did you mean 'macs'"):
        ResRep(budget="mac")
    groups, counts, evidence = setting(own("mlp", (1, 8, 8), widths=(16,)), (1, 8, 8), batch_size=8)
    with pytest.raises(PruningError, match="10 training steps or more, not 8"):
        ResRep().choose(groups, evidence, counts)
    with pytest.raises(PruningError, match="give a sparsity or target"):
        ResRep().choose(groups, evidence, None)
    with pytest.raises(PruningError, match="no channels to remove"):
        ResRep().choose(groups, evidence, [0])
    with pytest.raises(PruningError, match="no scores"):
        ResRep().scores(groups, evidence)
    stream = InnerDropout()
    groups, counts, evidence = setting(stream, (3, 8, 8), sparsity=0.95)
    with pytest.raises(PruningError, match=r"cannot reach 0\.\d+ of the MACs"):
        ResRep(budget="macs", inner=True).choose(groups, evidence, counts)


def test_batch_norm_scales_rank_by_size():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))
    groups, _, evidence = setting(model, (1, 8, 8))
    with pytest.raises(PruningError, match="its 4 scale factors are all equal"):
        BatchNormScale().choose(groups, evidence, [2])
    model[1].weight.data = torch.tensor([0.3, -0.9, -0.1, 0.7])
    assert BatchNormScale().scores(groups, evidence)[0].tolist() == pytest.approx([0.6, 1.8, 0.2, 1.4])
    assert BatchNormScale().choose(groups, evidence, [2]) == [[0, 2]]
    assert not BatchNormScale().trains
    assert BatchNormScale(sparsity_training=1e-4).trains
    groups, counts, evidence = setting(own("mlp", (1, 8, 8), widths=(16,)), (1, 8, 8))
    with pytest.raises(PruningError, match="no batch norm follows it"):
        BatchNormScale().choose(groups, evidence, counts)
    with pytest.raises(InputError, match="sparsity_training=-1"):
        BatchNormScale(sparsity_training=-1)


def test_sparsity_training_adds_the_subgradient_of_the_penalty():
    def trained(strength):
        torch.manual_seed(0)
        model = randomise(own("cnn", (1, 8, 8), widths=(8, 8)))
        model[1].weight.data[::2] *= -1
        before = model[1].weight.detach().clone()
        groups, counts, evidence = setting(model, (1, 8, 8), batch_size=64, lr=0.1)  # one step
        BatchNormScale(sparsity_training=strength).choose(groups, evidence, counts)
        return before, model[1].weight.detach()

    (before, small), (_, large) = trained(1e-9), trained(0.5)
    change = large - small
    assert torch.equal(change.sign(), -before.sign())
    assert torch.allclose(change.abs(), change.abs()[0].expand(8), rtol=1e-3)
