"""Dropout: where it goes, what it costs, and that members sharing a batch answer as each would alone."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import compress_uq as cuq
from compress_uq.cost import Cost, count_macs, measure_cost
from compress_uq.errors import InputError, UncertaintyError
from compress_uq.stages import Origin
from compress_uq.uncertain import UncertainModel, summarise
from compress_uq.uq import METHODS, MSP, DropoutNetwork, MCDropout, SampledDropout, Trained, find_sites
from compress_uq.uq.dropout import find_fold
from compress_uq.uq.masks import hashed_masks, random_masks, stratified_masks
from compress_uq.uq.sites import functional_dropout, named_sites
from small_models import PRUNABLE, InnerDropout, Leaves, own, randomise, torchvision

GENEROUS = Cost(1, 10**12, 1)


def names(model, shape):
    return [site.module for site in find_sites(model, torch.randn(1, *shape), 0.1)]


def test_sites_are_the_ends_of_blocks():
    assert names(own("resnet20"), (3, 32, 32)) == [f"layer{s}.{b}" for s in (1, 2, 3) for b in range(3)]
    assert names(own("resnet18"), (3, 32, 32)) == [f"layer{s}.{b}" for s in (1, 2, 3, 4) for b in range(2)]
    assert names(own("mlp", (1, 8, 8), widths=(32, 16)), (1, 8, 8)) == ["2", "4"]
    assert names(own("cnn", (1, 28, 28), widths=(8, 8)), (1, 28, 28)) == ["3", "7"]
    assert names(Leaves(), (3, 32, 32)) == ["bn1", "conv2", "fc1"]
    vgg = names(own("vgg19"), (3, 32, 32))
    assert len(vgg) == 16
    assert vgg[-1] == "features.52"


@pytest.mark.parametrize(
    ("name", "first", "last", "channels_last"),
    [
        ("resnet50", "layer1.0", "layer4.2", False),
        ("densenet121", "features.pool0", "features.denseblock4.denselayer16", False),
        ("convnext_tiny", "features.0.1", "features.7.2", False),
        ("shufflenet_v2_x0_5", "conv1.2", "conv5.2", False),
        ("regnet_y_400mf", "stem.2", "trunk_output.block4.block4-5", False),
        ("vit_b_16", "encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_11", True),
        ("swin_t", "features.0.2", "features.7.1", True),
    ],
)
def test_sites_of_torchvision_families_without_dropout(name, first, last, channels_last):
    model = torchvision(name)
    size = 224 if name == "vit_b_16" else 64
    sites = find_sites(model, torch.randn(1, 3, size, size), 0.1)
    assert (sites[0].module, sites[-1].module) == (first, last)
    assert not any(site.own for site in sites)
    width = sites[-1].shape[-1 if channels_last else 0]
    assert width == max(sites[-1].shape) > 1


def test_dropout_layers_without_a_rate_are_left_alone():
    last = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Dropout(0.0))
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Dropout(0.0), last, nn.Flatten(), nn.Linear(784 * 16, 4))
    for p in (None, 0.3):
        sites = find_sites(model, torch.randn(1, 3, 32, 32), p)
        assert [(site.module, site.p, site.own) for site in sites] == [("1", p or 0.1, False), ("3.1", p or 0.1, False)]
    with pytest.raises(UncertaintyError, match="2 is a dropout layer with p = 0: give a rate"):
        named_sites(model, ["2"], torch.randn(1, 3, 32, 32), None)


@pytest.mark.parametrize(
    ("name", "own_sites"),
    [("alexnet", 2), ("vgg11_bn", 2), ("mobilenet_v3_small", 1), ("efficientnet_b0", 1), ("squeezenet1_1", 1)],
)
def test_a_models_own_dropout_is_the_only_candidate(name, own_sites):
    sites = find_sites(torchvision(name), torch.randn(1, 3, 64, 64), None)
    assert len(sites) == own_sites
    assert all(site.own and "classifier" in site.module for site in sites)


def one_by_one(network, sites, masks, images):
    """Every member by itself: a plain forward pass with its own mask multiplied in."""
    answers = []
    for t in range(len(masks[0])):
        copied = copy.deepcopy(network).eval()
        for site, mask in zip(sites, masks, strict=True):
            copied.get_submodule(site.module).register_forward_hook(lambda _m, _i, o, m=mask[t]: o * m)
        with torch.no_grad():
            answers.append(copied(images))
    return torch.stack(answers)


@pytest.mark.parametrize("name", PRUNABLE)
def test_members_in_one_batch_equal_each_alone(name):
    model, shape = PRUNABLE[name]()
    model = randomise(model)
    images = torch.randn(2, *shape)
    candidates = find_sites(model, images[:1], None)
    for sites in (candidates[-1:], candidates[-3:]):
        generator = torch.Generator().manual_seed(1)
        masks = [stratified_masks(4, site.shape, 0.4, generator) for site in sites]
        fold = find_fold(model, sites, images[:1])
        sampled = SampledDropout(model, sites, 4, fold=fold, masks=masks)
        with torch.no_grad():
            got = sampled(images)
        wanted = one_by_one(model, sites, masks, images)
        assert got.shape == wanted.shape == (4, 2, wanted.shape[2])
        assert (got - wanted).abs().max() <= 2e-4 * wanted.abs().max()
        assert got.std(0).max() > 0


def test_the_fold_moves_out_of_a_branch_that_is_led_around():
    model = randomise(InnerDropout())
    sites = find_sites(model, torch.randn(1, 3, 32, 32), None)
    assert [s.module for s in sites] == ["branch.2"]
    assert find_fold(model, sites, torch.randn(1, 3, 32, 32)) == ""


def test_a_network_that_mixes_the_batch_is_refused():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.d, self.b = nn.Linear(64, 16), nn.Dropout(0.5), nn.Linear(16, 3)

        def forward(self, x):
            x = self.d(self.a(x.flatten(1)))
            return self.b(x - x.mean(0, keepdim=True))

    with pytest.raises(UncertaintyError, match="other images of the batch"):
        find_fold(Mixing(), find_sites(Mixing(), torch.randn(1, 1, 8, 8), None), torch.randn(1, 1, 8, 8))


def test_auto_takes_the_largest_set_within_the_budget():
    result = cuq.prune(own("resnet18"), torch.randn(1, 3, 32, 32), sparsity=0.6)
    plan = MCDropout().plan(result.model, result.origin)
    assert [s.module for s in plan.sites] == ["layer4.0", "layer4.1"]
    assert plan.ratio == pytest.approx(0.6, abs=0.02)
    wider = MCDropout(sampling_budget=1.0).plan(result.model, result.origin)
    assert [s.module for s in wider.sites][0] == "layer3.1"
    assert wider.ratio <= 1.0
    # The plan's cost is what a prediction costs.
    members = MCDropout(samples=7).fit(Trained((result.model,), result.origin))
    counted = count_macs(members, torch.randn(1, 3, 32, 32))
    assert counted == MCDropout(samples=7).plan(result.model, result.origin).macs


def test_no_site_within_the_budget_is_an_error_that_names_one():
    model = own("resnet20")
    origin = Origin((3, 32, 32), measure_cost(model, (3, 32, 32)))
    with pytest.raises(UncertaintyError, match=r"--sampling-budget 1\.0"):
        MCDropout().plan(model, origin)
    assert MCDropout(sampling_budget=1.01).plan(model, origin).sites[0].module == "layer3.2"


def test_named_sites():
    origin = Origin((3, 32, 32), GENEROUS)
    model = own("resnet20")
    assert [s.module for s in MCDropout(at="layer3.*").plan(model, origin).sites][0] == "layer3.0.conv1"
    plan = MCDropout(at=("layer3.2", "layer2.0"), p=0.3).plan(model, origin)
    assert [(s.module, s.p, s.shape) for s in plan.sites] == [
        ("layer2.0", 0.3, (32, 1, 1)), ("layer3.2", 0.3, (64, 1, 1)),
    ]  # fmt: skip
    with pytest.raises(UncertaintyError, match="did you mean 'layer3.2'"):
        MCDropout(at=("layer3.22",)).plan(model, origin)


def test_functional_dropout_is_reported_with_its_caller():
    class Functional(Leaves):
        def forward(self, x):
            return super().forward(F.dropout(x, 0.2, self.training))

    assert functional_dropout(Functional(), torch.randn(1, 3, 32, 32)) == ("forward",)
    assert functional_dropout(InnerDropout(), torch.randn(1, 3, 32, 32)) == ()


@pytest.mark.parametrize(("p", "members"), [(0.1, 20), (0.25, 8), (0.1, 5), (0.3, 7), (0.5, 1)])
def test_stratified_masks_drop_each_unit_equally_often(p, members):
    masks = stratified_masks(members, (4000,), p, torch.Generator().manual_seed(0))
    dropped = (masks == 0).sum(0).float()
    assert dropped.min() >= np.floor(p * members + 1e-9)
    assert dropped.max() <= np.ceil(p * members - 1e-9)
    assert dropped.mean().item() == pytest.approx(p * members, abs=4 * 0.5 / np.sqrt(4000))
    assert masks.unique().tolist() == pytest.approx([0, 1 / (1 - p)])


def test_hashed_masks_are_a_function_of_the_seed_alone():
    seeds = torch.tensor([0, 1, -5, 2**40, 1])
    masks = hashed_masks(20, seeds, (64, 1, 1), 0.1, salt=0)
    assert masks.shape == (20, 5, 64, 1, 1)
    assert torch.equal(masks[:, 1], masks[:, 4])
    assert torch.equal(masks[:, 2:3], hashed_masks(20, seeds[2:3], (64, 1, 1), 0.1, salt=0))
    assert not torch.equal(masks[:, 0], masks[:, 1])
    assert not torch.equal(masks, hashed_masks(20, seeds, (64, 1, 1), 0.1, salt=1))
    assert ((masks == 0).sum(0) == 2).all()


def test_hashed_masks_look_random_in_the_limit():
    masks = (hashed_masks(10, torch.arange(2000), (200,), 0.2, salt=3) == 0).double()
    share = masks.mean((0, 1))
    assert share.mean().item() == pytest.approx(0.2, abs=1e-9)
    first = masks[0]
    assert first.mean().item() == pytest.approx(0.2, abs=4 * 0.4 / np.sqrt(first.numel()))
    assert first.mean(0).std().item() == pytest.approx(0.4 / np.sqrt(2000), rel=0.25)
    neighbours = np.corrcoef(first[:-1].flatten(), first[1:].flatten())[0, 1]
    units = np.corrcoef(first[:, :-1].flatten(), first[:, 1:].flatten())[0, 1]
    assert abs(neighbours) < 4 / np.sqrt(first.numel())
    assert abs(units) < 4 / np.sqrt(first.numel())


def test_random_masks_are_fresh():
    like = torch.randn(3, 16, 4, 4)
    a, b = (random_masks(10, like, (16, 1, 1), 0.3) for _ in range(2))
    assert a.shape == (10, 3, 16, 1, 1)
    assert not torch.equal(a, b)
    assert ((a == 0).sum(0) == 3).all()


def test_fixed_samples_approach_the_dropout_distribution():
    model = randomise(own("cnn", (1, 8, 8), widths=(16, 16)))
    origin = Origin((1, 8, 8), GENEROUS)
    images = torch.randn(4, 1, 8, 8)
    network = MCDropout(p=0.2).prepare(model, origin)
    network.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    with torch.no_grad():
        plain = torch.stack([network(images).softmax(1) for _ in range(3000)])
        many = MCDropout(p=0.2, samples=2000).fit(Trained((model,), origin))(images).softmax(2)
    spread = plain.std(0) / np.sqrt(3000)
    assert (many.mean(0) - plain.mean(0)).abs().max() < 5 * spread.max() + 0.01
    assert (many.std(0) / plain.std(0)).mean().item() == pytest.approx(1, abs=0.1)


def test_training_drops_at_random_and_eval_does_not():
    network = MCDropout(p=0.5).prepare(own("resnet20"), Origin((3, 32, 32), GENEROUS))
    assert isinstance(network, DropoutNetwork)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(network.eval()(images), network(images))
    assert not torch.equal(network.train()(images), network(images))


def test_predicting_changes_no_batch_norm_statistic_whatever_mode_is_asked():
    model = UncertainModel(MSP().fit(Trained((own("resnet20"),), Origin())), MSP(), Origin((3, 32, 32)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first = model.train()(torch.ones(2, 3, 32, 32)).probabilities
    assert not any(m.training for m in model.modules())
    assert torch.equal(first, model(torch.ones(2, 3, 32, 32)).probabilities)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_figures_of_a_prediction_by_hand():
    logits = torch.log(torch.tensor([[[0.8, 0.2]], [[0.4, 0.6]]]))
    p = summarise(logits)
    assert p.probabilities[0].tolist() == pytest.approx([0.6, 0.4])
    assert p.label.tolist() == [0]
    assert p.label.dtype == torch.int64
    assert p.confidence.item() == pytest.approx(0.6)
    assert p.uncertainty.item() == pytest.approx(0.4)

    def h(*q):
        return -sum(x * np.log(x) for x in q)

    assert p.entropy.item() == pytest.approx(h(0.6, 0.4), abs=1e-6)
    assert p.mutual_information.item() == pytest.approx(h(0.6, 0.4) - (h(0.8, 0.2) + h(0.4, 0.6)) / 2, abs=1e-6)
    assert p.variance.item() == pytest.approx(0.04, abs=1e-6)
    one = summarise(torch.tensor([[[1000.0, -1000.0], [0.0, 0.0]]]))
    assert one.mutual_information.tolist() == [0, 0]
    assert one.entropy.tolist() == pytest.approx([0, np.log(2)], abs=1e-6)
    opposed = summarise(torch.tensor([[[200.0, 0.0]], [[0.0, 200.0]]]))
    assert opposed.mutual_information.item() == pytest.approx(np.log(2), abs=1e-5)


@pytest.mark.parametrize("samples", [2.5, 3.0, True, "3", 0])
@pytest.mark.parametrize("name", [n for n in METHODS.names if "samples" in METHODS[n].__dataclass_fields__])
def test_members_are_whole_numbers(name, samples):
    with pytest.raises(InputError, match=rf"samples={samples}: expected a whole number of at least"):
        METHODS[name](samples=samples)


@pytest.mark.parametrize("options", [{"p": 0}, {"p": 1.0}, {"samples": 0}, {"sampling_budget": 0}])
def test_impossible_options(options):
    with pytest.raises(InputError, match=str(next(iter(options.values())))):
        MCDropout(**options)


def test_untrained_insertion_warns_and_a_missing_shape_is_asked_for():
    pruned = cuq.prune(own("resnet20"), torch.randn(1, 3, 32, 32), sparsity=0.5, round_to=1)
    with pytest.warns(UserWarning, match="not trained with it"):
        cuq.fit_uncertainty(pruned, method="mc-dropout")
    with pytest.raises(InputError, match="example_inputs"), pytest.warns(UserWarning):
        cuq.fit_uncertainty(pruned.model, method=MCDropout())
    with pytest.raises(UncertaintyError, match="pass method="):
        cuq.fit_uncertainty(pruned)
