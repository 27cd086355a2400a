"""Pruning: exact counts, exact surgery, what is kept, and what is refused."""

import copy

import pytest
import torch
from torch import nn

import compress_uq as cuq
from compress_uq.errors import InputError, ModelError, PruningError, UnknownNameError
from compress_uq.models import ChannelSelect, as_logits
from compress_uq.pruning import Evidence, kept_channels
from compress_uq.pruning.criteria.l1 import L1
from compress_uq.pruning.graph.groups import dependency_groups
from small_models import PRUNABLE, DictOutput, OneLogit, TupleOutput, own, randomise

TABLE_1 = {
    "resnet18": (11_173_962, {0.2: 7_175_586, 0.4: 4_049_352, 0.6: 1_803_314, 0.8: 457_578}),
    "vgg19": (20_040_522, {0.2: 12_858_225, 0.4: 7_258_530, 0.6: 3_224_231, 0.8: 817_115}),
}


@pytest.mark.parametrize("name", TABLE_1)
def test_parameter_counts_of_holzbock_table_1(name):
    base, rows = TABLE_1[name]
    model = own(name)
    assert sum(p.numel() for p in model.parameters()) == base
    for sparsity, count in rows.items():
        result = cuq.prune(model, torch.randn(1, 3, 32, 32), sparsity=sparsity, round_to=1)
        assert result.after.parameters == count == sum(p.numel() for p in result.model.parameters())
        assert result.before.parameters == base


@pytest.mark.parametrize(
    ("channels", "sparsity", "round_to", "kept"),
    [
        (10, 0.9, 1, 1), (100, 0.8, 1, 20), (10, 0.3, 1, 7), (64, 0.6, 1, 26), (512, 0.2, 1, 410),
        (64, 0.6, 8, 24), (16, 0.3, 8, 16), (20, 0.4, 8, 16), (12, 0.5, 8, 8), (6, 0.5, 8, 6), (64, 0.99, 8, 8),
        (3, 0.5, 1, 2), (1, 0.5, 1, 1), (2, 0.99, 1, 1),
    ],
)  # fmt: skip
def test_kept_channels(channels, sparsity, round_to, kept):
    assert kept_channels(channels, sparsity, round_to) == kept


def zero_consumers(model: nn.Module, layers) -> nn.Module:
    """The dense model with the weights zeroed that read a removed channel; the slow oracle of pruning."""
    oracle = copy.deepcopy(model)
    for layer in layers:
        for name, positions in layer.consumers:
            module = oracle.get_submodule(name)
            if not positions:
                continue
            with torch.no_grad():
                if isinstance(module, ChannelSelect):
                    gone = torch.tensor([int(i) in positions for i in module.index])
                    module.index[gone] = module.in_channels
                elif isinstance(module, nn.Conv2d) and module.groups > 1 and module.groups == module.in_channels:
                    continue  # depthwise: its own output goes with it
                elif isinstance(module, nn.Conv2d) and module.groups > 1:
                    width = module.in_channels // module.groups
                    rows = module.out_channels // module.groups
                    for position in positions:
                        group = position // width
                        module.weight[group * rows : (group + 1) * rows, position % width] = 0
                else:
                    module.weight[:, list(positions)] = 0
    return oracle


@pytest.mark.parametrize("name", [n for n in PRUNABLE if "convnext" not in n])  # not valid across layer norm
def test_surgery_equals_zeroing_what_reads_the_removed_channels(name):
    model, shape = PRUNABLE[name]()
    model = randomise(model).double()
    images = torch.randn(2, *shape, dtype=torch.float64)
    result = cuq.prune(model, images, sparsity=0.4, round_to=1)
    oracle = zero_consumers(model, result.layers)
    with torch.no_grad():
        got, wanted, dense = result.model(images), oracle(images), model(images)
    scale = wanted.abs().max()
    assert (got - wanted).abs().max() <= 1e-9 * scale
    assert (got - dense).abs().max() > 1e-6 * scale, "the oracle must be able to fail"


@pytest.mark.parametrize("name", PRUNABLE)
def test_pruned_models_train_and_keep_their_classes(name):
    model, shape = PRUNABLE[name]()
    result = cuq.prune(model, torch.randn(1, *shape), sparsity=0.5)
    logits = as_logits(result.model.train()(torch.randn(4, *shape)))
    assert logits.shape == as_logits(model.eval()(torch.randn(1, *shape))).expand(4, -1).shape
    logits.sum().backward()
    assert result.after.macs < 0.75 * result.before.macs
    assert result.after.parameters < result.before.parameters


def scores(criterion, groups, model):
    return criterion.scores(groups, Evidence(model, torch.zeros(1)))


def test_l1_of_one_layer_orders_by_the_norm_of_the_filters():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    with torch.no_grad():
        for channel, size in enumerate((3.0, 1.0, 4.0, 2.0)):
            model[0].weight[channel] = size
    (group,) = dependency_groups(model, torch.randn(1, 1, 8, 8))
    assert scores(L1(), [group], model)[0].tolist() == pytest.approx([1.2, 0.4, 1.6, 0.8])
    result = cuq.prune(model, torch.randn(1, 1, 8, 8), sparsity=0.5, round_to=1)
    assert result.layers[0].removed == (1, 3)


def test_l1_of_coupled_layers_equals_torch_pruning():
    import torch_pruning as tp

    model = randomise(own("resnet18"))
    example = torch.randn(1, 3, 32, 32)
    groups = dependency_groups(copy.deepcopy(model), example)
    ours = {g.name: s for g, s in zip(groups, scores(L1(), groups, model), strict=True)}
    graph = tp.DependencyGraph().build_dependency(model, example)
    compared = 0
    for group in graph.get_all_groups(ignored_layers=[model.linear], root_module_types=[nn.Conv2d]):
        layers = {d.target.module for d, _ in group if graph.is_out_channel_pruning_fn(d.handler)}
        convs = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
        mean = torch.stack([(n := c.weight.double().abs().flatten(1).sum(1)) / n.mean() for c in convs]).mean(0)
        name = next(n for n, m in model.named_modules() if m is group[0].dep.target.module)
        assert torch.allclose(ours[name], mean.detach())
        compared += 1
    assert compared == len(ours) == 12


def test_the_callers_model_is_left_alone():
    model = own("resnet20").train()
    model.layer1[0].bn1.eval()
    model.layer2[0].conv1.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = cuq.prune(model, torch.randn(1, 3, 32, 32), sparsity=0.5, round_to=1)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    assert not model.layer1[0].bn1.training
    assert result.model.training
    assert not result.model.layer1[0].bn1.training
    assert not result.model.layer2[0].conv1.weight.requires_grad
    assert result.model.layer2[0].conv1.weight.shape == model.layer2[0].conv1.weight.shape[:1] + (
        result.model.layer2[0].conv1.in_channels, 3, 3,
    )  # fmt: skip


def test_a_result_knows_the_shape_and_the_dense_cost():
    first = cuq.prune(own("cnn", (1, 28, 28), widths=(32, 32)), torch.randn(1, 1, 28, 28), sparsity=0.25)
    second = cuq.prune(first, sparsity=0.5)
    assert second.origin.dense_cost == first.before
    with pytest.raises(InputError, match="example_inputs"):
        cuq.prune(first.model, sparsity=0.5)


def test_own_criterion():
    model = own("mlp", (1, 8, 8), widths=(16,))
    result = cuq.prune(
        model, torch.randn(1, 1, 8, 8), sparsity=0.5, criterion=lambda g: torch.arange(g.channels).double(), round_to=1
    )
    assert result.layers[0].removed == tuple(range(8))


@pytest.mark.parametrize("sparsity", [0, 1, -0.5, 1.5, float("nan"), float("inf")])
def test_impossible_sparsity(sparsity):
    with pytest.raises(PruningError, match="sparsity="):
        cuq.prune(own("mlp", (1, 8, 8)), torch.randn(1, 1, 8, 8), sparsity=sparsity)


def test_nothing_to_prune():
    with pytest.raises(PruningError, match="nothing can be pruned"):
        cuq.prune(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), torch.randn(1, 1, 8, 8), sparsity=0.5)
    with pytest.raises(PruningError, match="round_to 8 keeps every channel"):
        cuq.prune(own("mlp", (1, 8, 8), widths=(8,)), torch.randn(1, 1, 8, 8), sparsity=0.5)
    frozen = own("mlp", (1, 8, 8)).requires_grad_(False)
    with pytest.raises(PruningError, match="frozen"):
        cuq.prune(frozen, torch.randn(1, 1, 8, 8), sparsity=0.5)


def test_outputs_that_are_not_logits():
    images = torch.randn(1, 1, 8, 8)
    with pytest.raises(ModelError, match="tuple"):
        cuq.prune(TupleOutput(), images, sparsity=0.5)
    with pytest.raises(ModelError, match="two-logit"):
        cuq.prune(OneLogit(), images, sparsity=0.5)
    assert cuq.prune(DictOutput(), images, sparsity=0.5).after.parameters < 64 * 32
    with pytest.raises(ModelError, match=r"shape \(1, 9, 9\)"):
        cuq.prune(own("mlp", (1, 8, 8)), torch.randn(1, 1, 9, 9), sparsity=0.5)
    with pytest.raises(UnknownNameError, match="did you mean 'l1'"):
        cuq.prune(DictOutput(), images, sparsity=0.5, criterion="L1")
