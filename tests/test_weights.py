"""Unstructured pruning: which weights are masked, that masks hold, and what it does not save."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import compress_uq as cuq
from compress_uq.cost import measure_cost
from compress_uq.errors import InputError, PruningError, UnknownNameError
from compress_uq.pruning import Iterative, Lottery
from small_models import own

IMAGE = torch.randn(1, 1, 8, 8)
QUICK = cuq.TrainingConfig(epochs=2, lr=0.05, batch_size=32, device="cpu")


def mlp():
    return own("mlp", (1, 8, 8), widths=(32, 16))


def linear_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def digits(count=96):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 1, 8, 8, generator=generator)
    return cuq.Splits(train=torch.utils.data.TensorDataset(images, torch.arange(count) % 10))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_masks_are_those_of_torch(scope):
    model = mlp()
    result = cuq.mask_weights(model, IMAGE, sparsity=0.75, scope=scope)
    theirs = copy.deepcopy(model)
    pairs = [(layer, "weight") for layer in linear_layers(theirs).values()]
    if scope == "global":
        torch_prune.global_unstructured(pairs, torch_prune.L1Unstructured, amount=0.75)
    else:
        for layer, name in pairs:
            torch_prune.l1_unstructured(layer, name, amount=0.75)
    for name, layer in linear_layers(theirs).items():
        assert torch.equal(result.model.get_submodule(name).weight, layer.weight)
    assert result.sparsity == pytest.approx(0.75, abs=0.001)


def test_nothing_is_saved_and_the_result_says_so():
    model = mlp()
    result = cuq.mask_weights(model, IMAGE, sparsity=0.9)
    assert result.cost == measure_cost(model, (1, 8, 8))
    assert measure_cost(result.model, (1, 8, 8)).macs == result.cost.macs
    assert {layer.name for layer in result.layers} == set(linear_layers(model))


def test_masks_hold_through_fine_tuning_and_come_off():
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    masked = cuq.mask_weights(model, IMAGE, sparsity=0.8)
    tuned = cuq.finetune(masked, digits(), training=QUICK, augment="none")
    for layer in masked.layers:
        was = masked.model.get_submodule(layer.name).weight == 0
        now = tuned.model.get_submodule(layer.name).weight
        assert int(was.sum()) == layer.masked
        assert torch.equal(now == 0, was)
        assert not torch.equal(now, masked.model.get_submodule(layer.name).weight), "training moved the others"
    baked, bare = cuq.remove_masks(tuned.model), cuq.remove_masks(masked.model, permanent=False)
    assert baked.state_dict().keys() == before.keys()
    with torch.no_grad():
        assert torch.equal(baked(IMAGE), tuned.model(IMAGE))
    assert all(torch.equal(value, before[name]) for name, value in bare.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(PruningError, match="no masks"):
        cuq.remove_masks(baked)


def test_the_three_networks_of_aguettaz():
    model, splits = mlp(), digits()
    net1 = cuq.mask_weights(model, IMAGE, sparsity=0.8, schedule=Iterative(4), splits=splits, training=QUICK)
    net2 = cuq.mask_weights(
        model, IMAGE, sparsity=0.8, schedule=Iterative(4, first="random"), splits=splits, training=QUICK
    )
    net3 = cuq.mask_weights(model, IMAGE, sparsity=0.8)
    masks = [
        torch.cat([(m.weight == 0).flatten() for m in linear_layers(n.model).values()]) for n in (net1, net2, net3)
    ]
    assert [len(net.history) for net in (net1, net2, net3)] == [2, 2, 0]
    assert all(net.sparsity == pytest.approx(0.8, abs=0.002) for net in (net1, net2, net3))
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    largest = torch.cat(
        [m.weight.abs().flatten() >= m.weight.abs().quantile(0.9) for m in linear_layers(model).values()]
    )
    lost = [float((mask & largest).sum() / largest.sum()) for mask in masks]
    assert lost[2] == 0
    assert 0.1 < lost[1] < 0.3, "the first fifth is drawn at random, from large and small alike"


def test_a_sparse_ticket_starts_from_the_initial_weights():
    initial, trained = mlp(), mlp()
    ticket = cuq.mask_weights(trained, IMAGE, sparsity=0.6, schedule="lottery", initial=initial)
    for name, layer in linear_layers(initial).items():
        kept = ticket.model.get_submodule(name).weight
        assert torch.equal(kept, layer.weight * (kept != 0))
        order = linear_layers(trained)[name].weight.abs()
        assert order[kept != 0].min() >= order[kept == 0].max()
    drawn = cuq.mask_weights(trained, IMAGE, sparsity=0.6, schedule=Lottery(rewind="random"), seed=3)
    assert drawn.sparsity == ticket.sparsity
    with pytest.raises(PruningError, match="initial="):
        cuq.mask_weights(trained, IMAGE, sparsity=0.6, schedule="lottery")


def test_what_is_refused():
    with pytest.raises(PruningError, match="sparsity=1"):
        cuq.mask_weights(mlp(), IMAGE, sparsity=1)
    with pytest.raises(PruningError, match="nothing was masked"):
        cuq.mask_weights(mlp(), IMAGE, sparsity=1e-6)
    with pytest.raises(UnknownNameError, match="magnitude"):
        cuq.mask_weights(mlp(), IMAGE, sparsity=0.5, rule="magnitud")
    with pytest.raises(PruningError, match="keep 'head'"):
        cuq.mask_weights(mlp(), IMAGE, sparsity=0.5, keep=["head"])
    masked = cuq.mask_weights(mlp(), IMAGE, sparsity=0.5)
    with pytest.raises(PruningError, match="parametrised"):
        cuq.mask_weights(masked, sparsity=0.7)
    with pytest.raises(InputError, match="splits="):
        cuq.mask_weights(mlp(), IMAGE, sparsity=0.5, schedule="iterative", training=QUICK)
