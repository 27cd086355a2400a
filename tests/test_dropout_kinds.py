"""Each kind of dropout against a plain loop, batched members against one at a time, and how fixed masks are chosen."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Subset, TensorDataset

import compress_uq as cuq
from compress_uq.cost import Cost, count_macs
from compress_uq.errors import InputError, UncertaintyError, UnknownNameError
from compress_uq.runtime import OnnxPredictor
from compress_uq.stages import Origin
from compress_uq.types import OUTPUT_NAMES
from compress_uq.uncertain import UncertainModel, summarise
from compress_uq.uq import MCDropout, Trained, find_sites
from compress_uq.uq.connections import grouped_layer
from compress_uq.uq.dropout import draw_masks
from small_models import PRUNABLE, InnerDropout, own, randomise, torchvision

KINDS = ["channel", "element", "filter", "connection"]
SHAPE = (1, 8, 8)
ORIGIN = Origin(SHAPE, Cost(1, 10**12, 1), ("a", "b", "c", "d"), (0.5,), (0.25,))


def cnn() -> nn.Module:
    torch.manual_seed(0)
    options = {"widths": [16, 16]}
    model = randomise(cuq.build_model("compress-uq:cnn", num_classes=4, input_shape=SHAPE, options=options))
    model[-1].weight.data *= 5
    return model


def fitted(kind: str, model: nn.Module | None = None, **options) -> UncertainModel:
    method = MCDropout(kind=kind, **{"p": 0.2, "samples": 5, **options})
    return UncertainModel(method.fit(Trained((model or cnn(),), ORIGIN)), method, ORIGIN)


def alone(network: nn.Module, sites, masks, images: torch.Tensor) -> torch.Tensor:
    """Every member by itself: its masks multiplied into outputs, or into weights, of a plain copy."""
    answers = []
    for t in range(len(masks[0])):
        copied = copy.deepcopy(network).eval()
        for site, mask in zip(sites, masks, strict=True):
            module = copied.get_submodule(site.module)
            if site.of_weights:
                module.weight.data *= mask[t]
            else:
                module.register_forward_hook(lambda _m, _i, o, m=mask[t]: o * m)
        with torch.no_grad():
            answers.append(copied(images))
    return torch.stack(answers)


def test_what_each_kind_drops_and_where():
    found = {kind: find_sites(own("resnet20"), torch.randn(1, 3, 32, 32), 0.1, kind) for kind in KINDS}
    last = {kind: sites[-1] for kind, sites in found.items()}
    assert (last["channel"].module, last["channel"].shape) == ("layer3.2", (64, 1, 1))
    assert (last["element"].module, last["element"].shape) == ("layer3.2", (64, 8, 8))
    assert (last["filter"].module, last["filter"].shape) == ("layer3.2.conv2", (64, 1, 1))
    assert (last["connection"].module, last["connection"].shape) == ("linear", (10, 64))
    assert len(found["filter"]) == len(found["connection"]) - 1 >= 19
    own_dropout = torchvision("alexnet")
    example = torch.randn(1, 3, 64, 64)
    assert [(s.own, s.shape) for s in find_sites(own_dropout, example, None)] == [(True, (9216,)), (True, (4096,))]
    assert [(s.own, s.p) for s in find_sites(own_dropout, example, None, "element")] == [(False, 0.5)] * 2
    assert find_sites(InnerDropout(), torch.randn(1, 3, 32, 32), None, "channel")[0].shape == (16, 1, 1)


def test_named_modules_stand_for_the_layers_inside():
    model, origin = own("resnet20"), Origin((3, 32, 32), Cost(1, 10**12, 1))
    plan = MCDropout(kind="connection", at=("layer3.2", "linear")).plan(model, origin)
    assert [s.module for s in plan.sites] == ["layer3.2.conv1", "layer3.2.conv2", "linear"]
    assert MCDropout(kind="filter", at="layer3.2").plan(model, origin).fold == "layer3.2"
    with pytest.raises(UncertaintyError, match="layer3.2.bn2: no linear or convolutional layer"):
        MCDropout(kind="filter", at="layer3.2.bn2").plan(model, origin)
    with pytest.raises(UnknownNameError, match="did you mean 'connection'"):
        MCDropout(kind="connections")
    with pytest.raises(InputError, match="candidates=0"):
        MCDropout(candidates=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp", "resnet20", "leaves", "inner dropout", "torchvision mobilenet_v2"])
def test_batched_members_equal_each_alone_and_cost_what_is_planned(kind, name):
    model, shape = PRUNABLE[name]()
    model, origin = randomise(model), Origin(shape, Cost(1, 10**12, 1))
    images = torch.randn(3, *shape)
    candidates = [site.module for site in find_sites(model, images[:1], 0.3, kind)]
    method = MCDropout(p=0.3, kind=kind, samples=4, at=tuple(candidates[-3:]), seed=3)
    plan = method.plan(model, origin)
    members = method.fit(Trained((model,), origin))
    masks = [masked.masks for masked in members.masked]
    with torch.no_grad():
        got = members(images)
    wanted = alone(model, members.sites, masks, images)
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() <= 2e-5 * wanted.abs().max()
    assert got.std(0).max() > 0
    assert count_macs(members, images[:1]) == plan.macs


DROPPED_AFTER = {"channel": "37", "element": "37", "filter": "04", "connection": "049"}


def loop_of_draws(model: nn.Module, kind: str, images: torch.Tensor, p: float, draws: int) -> torch.Tensor:
    """Probabilities (draws, N, K) of the small CNN, dropped by hand, one image and one draw at a time."""

    def noise(*shape):
        return F.dropout(torch.ones(shape), p)

    answers = torch.empty(draws, len(images), 4)
    for t in range(draws):
        for n in range(len(images)):
            x = images[n : n + 1]
            for name, layer in model.named_children():
                here = name in DROPPED_AFTER[kind]
                if here and kind == "connection":
                    weights = {"weight": layer.weight * noise(*layer.weight.shape)}
                    x = torch.func.functional_call(layer, weights, (x,))
                    continue
                x = layer(x)
                if here:
                    x = x * noise(*(x.shape if kind == "element" else (1, x.shape[1], 1, 1)))
            answers[t, n] = x.softmax(1)
    return answers


@pytest.mark.parametrize("kind", KINDS)
def test_many_samples_have_the_mean_and_spread_of_plain_dropout(kind):
    model, images = cnn(), torch.randn(2, *SHAPE)
    with torch.no_grad():
        plain = loop_of_draws(model, kind, images, 0.2, 1500)
        fixed = fitted(kind, model, samples=1500).members(images).softmax(2)
        network = MCDropout(p=0.2, kind=kind).prepare(model, ORIGIN).train()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        trained = network(images.repeat_interleave(1500, 0)).softmax(1).unflatten(0, (2, 1500)).transpose(0, 1)
        fresh = fitted(kind, model, samples=10).members.with_sampling("random")
        random = torch.cat([fresh(images) for _ in range(150)]).softmax(2)
    error = plain.std(0).max().item() / np.sqrt(1500)
    draws = {"fixed": fixed, "random": random}
    if kind != "connection":  # eight draws of weights in a batch: no limit to look at
        draws["training"] = trained
    for name, sample in draws.items():
        assert (sample.mean(0) - plain.mean(0)).abs().max().item() < 6 * error, name
        assert (sample.std(0) / plain.std(0)).mean().item() == pytest.approx(1, abs=0.08), name


def test_connections_are_dropped_anew_in_each_step_and_not_in_eval():
    model, images = cnn(), torch.randn(8, *SHAPE)
    network = MCDropout(p=0.5, kind="connection").prepare(model, ORIGIN)
    with torch.no_grad():
        assert torch.allclose(network.eval()(images), model(images), atol=1e-5)
        network.network.train(False)
        for dropped in network.inserted:
            dropped.train()
        same = images[:1].expand(8, -1, -1, -1)
        first, second = network(same), network(same)
    assert len({tuple(row.tolist()) for row in first}) == 8
    assert not torch.allclose(first, second)
    network.train()
    network(images).sum().backward()
    assert all(p.grad is not None for p in network.network.parameters())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 3), (6,)),
        (nn.Linear(6, 3, bias=False), (5, 6)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 7, 7)),
        (nn.Conv2d(4, 6, (1, 3), dilation=2, groups=2, bias=False), (4, 7, 7)),
        (nn.Conv2d(4, 4, 3, groups=4, padding="same"), (4, 7, 7)),
    ],
)
def test_a_layer_of_groups_equals_a_layer_per_group(layer, shape):
    inputs, weights = torch.randn(3 * 2, *shape), torch.randn(3, *layer.weight.shape)
    got = grouped_layer(layer, inputs, weights)
    for group in range(3):
        one = torch.func.functional_call(layer, {"weight": weights[group]}, (inputs[2 * group : 2 * group + 2],))
        assert torch.allclose(got[2 * group : 2 * group + 2], one, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "sampling"), [(k, s) for k in KINDS for s in ("fixed", "seeded", "random") if k + s != "connectionseeded"]
)
def test_every_kind_exports_in_every_mode(kind, sampling, tmp_path):
    model = fitted(kind)
    result = cuq.export_onnx(model, tmp_path / "m.onnx", sampling=sampling)
    assert result.gates["members"].startswith("variance")
    images = np.random.default_rng(0).normal(size=(4, *SHAPE)).astype(np.float32)
    predictor = OnnxPredictor(tmp_path / "m.onnx")
    if sampling == "fixed":
        with torch.no_grad():
            wanted = model(torch.from_numpy(images))
        got = predictor(images)
        for name in OUTPUT_NAMES:
            assert np.allclose(getattr(got, name), getattr(wanted, name).numpy(), atol=1e-5), name
    elif sampling == "seeded":
        seeds = np.array([5, 6, 5, -1])
        whole = predictor(images, seeds)
        part = predictor(images[[2, 0]], seeds[[2, 0]])
        assert np.allclose(whole.probabilities[[2, 0]], part.probabilities, atol=1e-6)
        assert not np.allclose(whole.variance, predictor(images, seeds + 1).variance, atol=1e-6)
    else:
        assert not np.array_equal(predictor(images).probabilities, predictor(images).probabilities)


def test_connections_refuse_a_seed_per_image():
    with pytest.raises(UncertaintyError, match="'seeded': these members sample in the mode fixed or random"):
        fitted("connection").members.with_sampling("seeded")


def digits_like(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, *SHAPE, generator=generator), torch.zeros(count, dtype=torch.int64))


def with_images(images: TensorDataset, **options) -> UncertainModel:
    method = MCDropout(**{"p": 0.2, "samples": 5, **options})
    return UncertainModel(method.fit(Trained((cnn(),), ORIGIN, calibration=images)), method, ORIGIN)


def measured(model: UncertainModel, images: torch.Tensor, masks, reference) -> tuple[float, float]:
    """Spearman of mutual information and difference of probabilities to a reference, of given masks."""
    other = copy.deepcopy(model)
    for masked, mask in zip(other.members.masked, masks, strict=True):
        masked.masks.copy_(mask)
    with torch.no_grad():
        answer = other(images)
    correlation = spearmanr(answer.mutual_information.numpy(), reference.mutual_information.numpy())[0]
    return correlation, (answer.probabilities - reference.probabilities).abs().mean().item()


def test_the_masks_kept_stand_for_many_better_than_the_median_draw(dense, splits):
    origin = Origin(SHAPE, Cost(1, 10**12, 1)).of_data(splits)
    method = MCDropout(p=0.2, samples=10)
    members = method.fit(Trained((dense.model,), origin, calibration=splits.calibration))
    fidelity = members.fidelity
    assert (fidelity.draws, fidelity.images, fidelity.reference) == (16, len(splits.calibration), 200)
    assert min(fidelity.spearman, fidelity.spearman_median) > 0.5
    model = UncertainModel(members, method, origin)
    unseen = torch.stack([splits.test[n][0] for n in range(len(splits.test))])
    with torch.no_grad():
        reference = summarise(MCDropout(p=0.2, samples=500, seed=99).fit(Trained((dense.model,), origin))(unseen))
    draws = [measured(model, unseen, draw_masks(members.sites, 10, 104_729 * n), reference) for n in range(16)]
    kept = measured(model, unseen, [m.masks for m in members.masked], reference)
    assert kept == draws[fidelity.kept]
    assert kept[0] >= np.median([d[0] for d in draws])
    assert kept[1] <= np.median([d[1] for d in draws])


def test_masks_are_chosen_on_one_half_of_the_images_and_measured_on_the_other():
    images = digits_like(80, 3)
    model = with_images(images, candidates=4)
    members, fidelity = model.members, model.members.fidelity
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    draws = [draw_masks(members.sites, 5, 104_729 * n) for n in range(4)]
    references = [draw_masks(members.sites, 5, 104_729 * n + 7_919) for n in range(40)]
    many = fitted("channel", samples=200)
    for site, masked in enumerate(many.members.masked):
        masked.masks.copy_(torch.cat([masks[site] for masks in references]))

    def figures(half: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            reference = many(images.tensors[0][half])
        found = [measured(model, images.tensors[0][half], masks, reference) for masks in draws]
        return np.array([f[0] for f in found]), np.array([f[1] for f in found])

    correlations, differences = figures(order[::2])
    near = differences <= np.median(differences)
    assert fidelity.kept == int(np.argmax(np.where(near, correlations, -2.0)))
    correlations, differences = figures(order[1::2])
    assert fidelity.images == 80
    assert fidelity.spearman == pytest.approx(correlations[fidelity.kept], abs=0.01)
    assert fidelity.spearman_median == pytest.approx(np.median(correlations), abs=0.01)
    assert fidelity.difference == pytest.approx(differences[fidelity.kept], rel=1e-3)
    assert fidelity.difference_median == pytest.approx(np.median(differences), rel=1e-3)


def test_choosing_masks_is_reproducible_and_looks_at_no_label():
    images = digits_like(120, 3).tensors[0]
    first = with_images(TensorDataset(images, torch.zeros(120, dtype=torch.int64)))
    again = with_images(TensorDataset(images, torch.randint(0, 4, (120,))))
    assert first.members.fidelity == again.members.fidelity
    assert all(torch.equal(a.masks, b.masks) for a, b in zip(first.members.masked, again.members.masked, strict=True))
    few, none = with_images(digits_like(20, 3)), fitted("channel")
    assert few.members.fidelity is none.members.fidelity is None
    assert few.members.not_compared == "there were 20 calibration images, and 50 are needed"
    assert "0 calibration images" in none.members.not_compared
    assert "a single sample" in with_images(digits_like(60, 3), samples=1).members.not_compared
    assert first.members.not_compared is few.members.with_sampling("random").not_compared is None
    assert torch.equal(few.members.masked[0].masks, none.members.masked[0].masks)
    alone_draw = with_images(digits_like(120, 3), candidates=1).members
    assert torch.equal(alone_draw.masked[0].masks, none.members.masked[0].masks)
    assert alone_draw.fidelity.spearman == alone_draw.fidelity.spearman_median


def test_what_was_measured_of_the_masks_is_saved_and_shown(tmp_path, splits, dense):
    bundle = cuq.compress(
        dense.model, splits, sparsity=0.5, epochs=1, uq=MCDropout(samples=6, kind="filter", sampling_budget=2.0),
        arch=dense.architecture,
    )  # fmt: skip
    fidelity = bundle.model.members.fidelity
    bundle.save(tmp_path / "b")
    loaded = cuq.Bundle.load(tmp_path / "b")
    assert loaded.model.members.fidelity == fidelity
    assert OnnxPredictor(tmp_path / "b" / "model.onnx").metadata["fidelity"]["spearman"] == fidelity.spearman
    said = (tmp_path / "b" / "report.md").read_text()
    assert "Spearman of MI, 6 and 204 samples" in said
    assert (
        f"of 16 draws the one that ranks calibration images, labels unseen, as 204 samples do; chosen on half of "
        f"{fidelity.images} images" in said
    )
    assert "were not compared" not in said
    images = torch.stack([splits.test[n][0] for n in range(5)])
    assert torch.equal(loaded.model(images).probabilities, bundle.model(images).probabilities)


def test_the_card_says_which_samples_were_not_compared_and_why(splits, dense):
    few = replace(splits, calibration=Subset(splits.calibration, range(40)))
    cards = {
        uq: cuq.compress(dense.model, few, sparsity=0.5, epochs=0, uq=uq, calibration="none").report.to_json()
        for uq in ("mc-dropout", "msp")
    }
    assert cards["mc-dropout"]["fidelity"] is None
    assert cards["mc-dropout"]["warnings"][-1] == (
        "the fixed masks of 20 samples were not compared with those of many more: there were 40 calibration images, "
        "and 50 are needed"
    )
    assert (
        cards["mc-dropout"]["conventions"]["samples"] == "fixed masks: the first draw, not compared with more samples"
    )
    assert "samples" not in cards["msp"]["conventions"]
    assert "samples" not in " ".join(cards["msp"]["warnings"])


def test_twenty_fixed_samples_rank_cifar_as_two_hundred_do(real_data, real_data_module):
    dense = cuq.load_model(
        real_data / "weights" / "cifar10_resnet20-12fca82f.th", arch="compress-uq:resnet20", num_classes=10
    )
    mean, std = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
    pixels, labels = real_data_module.cifar10(train=False)
    normal = (pixels[:2500] / 255.0 - mean) / std
    images = torch.from_numpy(normal.astype(np.float32).transpose(0, 3, 1, 2).copy())
    pruned = cuq.prune(dense, images[:1], sparsity=0.2, round_to=1)
    calibration = TensorDataset(images[:500], torch.from_numpy(labels[:500]).long())
    options = {"p": 0.1, "at": ("layer3.2",)}
    members = MCDropout(samples=20, **options).fit(Trained((pruned.model,), pruned.origin, calibration=calibration))
    reference = MCDropout(samples=200, seed=12345, **options).fit(Trained((pruned.model,), pruned.origin))
    with torch.no_grad():
        information = [
            torch.cat([summarise(m(batch)).mutual_information for batch in images[500:].split(100)]).numpy()
            for m in (members, reference)
        ]
    assert spearmanr(*information)[0] >= 0.90
    assert members.fidelity.spearman >= 0.90
