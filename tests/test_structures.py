"""Structures: every kind of block is pruned exactly, and what cannot be is refused by name."""

import copy
import json
import logging
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models import convnext, densenet, maxvit, swin_transformer, vision_transformer

import compress_uq as cuq
from compress_uq.errors import ModelError, PruningError
from compress_uq.models import as_logits
from compress_uq.pruning.graph.groups import dependency_groups
from compress_uq.structure import describe_structure, rebuild
from oracle import masked, randomise, relative_difference


def swin(block=swin_transformer.SwinTransformerBlock, merging=swin_transformer.PatchMerging):
    return swin_transformer.SwinTransformer(
        [4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=5, block=block, downsample_layer=merging
    )  # fmt: skip


def swin_v2():
    return swin(swin_transformer.SwinTransformerBlockV2, swin_transformer.PatchMergingV2)


class Reused(nn.Module):
    """One convolution and one batch norm, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.bn = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x)
        for _ in range(2):
            x = F.relu(self.bn(self.conv(x)))
        return self.head(x.mean((2, 3)))


class Views(nn.Module):
    """view() in the middle and before the head, and channels scaled and shifted by parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3)
        self.gamma, self.shift, self.scale = (
            nn.Parameter(torch.randn(16)), nn.Parameter(torch.randn(1, 24, 1, 1)), nn.Parameter(torch.ones(1)),
        )  # fmt: skip
        self.head = nn.Linear(24 * 16, 4)

    def forward(self, x):
        x = self.conv(x) * self.gamma.view(1, -1, 1, 1) * self.scale
        x = F.adaptive_avg_pool2d(self.last(x) + self.shift, 4)
        return self.head(x.view(x.size(0), -1))


class Attention(nn.Module):
    """Tokens by torch's attention, after the manner of a small ViT without a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim = 32
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 32)), nn.Parameter(torch.randn(1, 17, 32))
        self.norm = nn.LayerNorm(32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, self.embed_dim), x], 1) + self.places
        y = self.norm(x)
        x = x + self.attention(y, y, y)[0]
        return self.head(x[:, 0])


class Rearranged(nn.Module):
    """Operations between convolutions that mix up the order of channels, whatever their number."""

    def __init__(self, between) -> None:
        super().__init__()
        self.between = between
        self.first, self.last, self.head = nn.Conv2d(3, 16, 3), nn.LazyConv2d(24, 1), nn.Linear(24, 4)

    def forward(self, x):
        return self.head(self.last(self.between(self.first(x))).mean((2, 3)))


REARRANGED = {
    "shuffle": lambda x: x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape),
    "flip": lambda x: x.flip(1),
    "index": lambda x: x[:, torch.arange(x.shape[1] - 1, -1, -1)],
    "roll": lambda x: x.roll(1, 1),
    "slice": lambda x: x[:, 2:14],
    "unequal split": lambda x: x.split((6, 10), 1)[1],
    "pixel unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "tokens flattened": lambda x: x.flatten(2).transpose(1, 2).flatten(1)[:, :, None, None],
}


@pytest.mark.parametrize("name", REARRANGED)
def test_channels_that_change_places_are_kept(name, caplog):
    model = Rearranged(REARRANGED[name])
    images = torch.randn(2, 3, 16, 16)
    model(images)
    with caplog.at_level(logging.INFO):
        result = cuq.prune(model, images, sparsity=0.5, round_to=1)
    assert [layer.name for layer in result.layers] == ["last"]
    assert "first keeps its channels: " in caplog.text


class Halves(nn.Module):
    """Chunks of channels that are multiplied with each other, and chunks that go different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gated = nn.Conv2d(3, 32, 3), nn.Conv2d(16, 32, 1)
        self.left, self.right, self.head = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 24, 1), nn.Linear(40, 4)

    def forward(self, x):
        value, gate = self.first(x).chunk(2, 1)
        a, b = self.gated(value * gate.sigmoid()).chunk(2, 1)
        return self.head(torch.cat([self.left(a).relu(), self.right(b).relu()], 1).mean((2, 3)))


class Masks(nn.Module):
    """A mask over places and a table over classes: no value in them belongs to one channel alone, or to no other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 32, 1)
        self.mask, self.table = nn.Parameter(torch.rand(1, 1, 14, 14)), nn.Parameter(torch.randn(32, 4))

    def forward(self, x):
        return self.last(F.relu(self.conv(self.first(x) * self.mask))).mean((2, 3)) @ self.table


def without_warnings(name, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return models.get_model(name, weights=None, num_classes=5, **options)


# name -> model, image side, layers that keep all their channels
STRUCTURES = {
    "swin": (swin, 40, 0),
    "swin v2": (swin_v2, 40, 0),
    "vit": (lambda: vision_transformer.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=5), 32, 0),
    "maxvit": (
        lambda: maxvit.MaxVit((32, 32), 16, 4, [16, 32], [1, 1], 8, 0.2, num_classes=5), 32, 0,
    ),
    "convnext": (
        lambda: convnext.ConvNeXt([convnext.CNBlockConfig(16, 32, 1), convnext.CNBlockConfig(32, None, 1)], num_classes=5),
        32, 0,
    ),
    "densenet": (lambda: densenet.DenseNet(16, (2, 2), 16, num_classes=5), 64, 0),
    "shufflenet": (lambda: without_warnings("shufflenet_v2_x0_5"), 64, 4),
    "squeezenet": (lambda: without_warnings("squeezenet1_1"), 64, 0),
    "mnasnet": (lambda: without_warnings("mnasnet0_5"), 64, 0),
    "googlenet": (lambda: without_warnings("googlenet", init_weights=False), 64, 0),
    "mobilenet": (lambda: without_warnings("mobilenet_v3_small"), 64, 0),
    "regnet": (lambda: without_warnings("regnet_y_400mf"), 64, 0),
    "reused": (Reused, 16, 0),
    "views": (Views, 16, 0),
    "attention": (Attention, 16, 0),
    "halves": (Halves, 16, 0),
    "masks": (Masks, 16, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", STRUCTURES)
def test_pruned_exactly_trains_and_is_rebuilt(name):
    build, side, whole = STRUCTURES[name]
    model = randomise(build()).double()
    images = torch.randn(2, 3, side, side, dtype=torch.double)
    result = cuq.prune(model, images, sparsity=0.5, round_to=4)
    oracle = masked(model, images, {layer.name: layer.removed for layer in result.layers})
    with torch.no_grad():
        got, wanted, dense = result.model(images), oracle(images), model(images)
    assert relative_difference(got, wanted) <= 1e-9
    assert relative_difference(got, dense) > 1e-6, "the oracle must be able to fail"

    before = {n: m.weight.shape for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert sum(result.model.get_submodule(n).weight.shape == shape for n, shape in before.items()) == whole
    assert {p.dtype for p in result.model.parameters()} == {torch.double}
    assert not result.model.training
    assert all(p.requires_grad for p in result.model.parameters())

    structure = json.loads(json.dumps(describe_structure(model, result.model)))
    again = rebuild(build().double(), structure)
    again.load_state_dict(result.model.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(images), got)

    # Images of another size of batch, and, where the network has them, its auxiliary classifiers.
    outputs = result.model.train()(torch.randn(3, 3, side, side, dtype=torch.double))
    several = outputs if isinstance(outputs, tuple) else (as_logits(outputs),)
    sum(output.sum() for output in several).backward()


@pytest.mark.parametrize("share", [0.25, 0.7])
def test_attention_keeps_its_heads_and_widths(share):
    model = vision_transformer.VisionTransformer(32, 8, 1, 4, 32, 64, num_classes=5)
    result = cuq.prune(model, torch.randn(1, 3, 32, 32), sparsity=share, round_to=1)
    block = result.model.encoder.layers[0].self_attention
    assert result.model.hidden_dim == block.embed_dim == block.num_heads * block.head_dim
    assert block.embed_dim == 32 - int(32 * share) // 4 * 4
    assert block.num_heads == 4
    small = cuq.prune(swin(), torch.randn(1, 3, 40, 40), sparsity=share, round_to=1).model
    heads = [m for m in small.modules() if isinstance(m, swin_transformer.ShiftedWindowAttention)]
    assert all(m.qkv.out_features == 3 * m.qkv.in_features and m.qkv.in_features % m.num_heads == 0 for m in heads)


def test_pruning_twice_equals_masking_both():
    model = randomise(swin()).double()
    images = torch.randn(1, 3, 40, 40, dtype=torch.double)
    once = cuq.prune(model, images, sparsity=0.25, round_to=1)
    twice = cuq.prune(once, sparsity=0.25, round_to=1)
    removed = {}
    for first, second in zip(once.layers, twice.layers, strict=True):
        kept = [channel for channel in range(first.before) if channel not in first.removed]
        removed[first.name] = [*first.removed, *(kept[channel] for channel in second.removed)]
    with torch.no_grad():
        assert relative_difference(twice.model(images), masked(model, images, removed)(images)) <= 1e-9


def test_timm_models():
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        depth=1,
        embed_dim=24,
        num_heads=2,
        num_classes=5,
        qk_norm=True,
    )
    plain = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16, depths=(2, 1), num_heads=(2, 4), num_classes=5
    )  # fmt: skip
    for network in (model, plain):
        network = randomise(network).double()
        images = torch.randn(1, 3, 32, 32, dtype=torch.double)
        result = cuq.prune(network, images, sparsity=0.5, round_to=4)
        oracle = masked(network, images, {layer.name: layer.removed for layer in result.layers})
        with torch.no_grad():
            assert relative_difference(result.model(images), oracle(images)) <= 1e-9
        assert result.after.parameters < 0.45 * result.before.parameters


class Plain(nn.Module):
    """Three convolutions, and whatever a test adds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 24, 3)
        self.head = nn.Linear(24, 4)

    def between(self, x):
        return x

    def forward(self, x):
        x = self.a(x)
        x = self.between(x + self.b(x))
        return self.head(self.c(x).mean((2, 3)))


class Buffered(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(1, 16, 1, 1))

    def between(self, x):
        return x - self.mean


class Ambiguous(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.randn(1, 16, 16, 1))

    def between(self, x):
        return x * self.map[..., :1]


class Bilinear(Ambiguous):
    def between(self, x):
        return x * self.map


class CountsItsChannels(Plain):
    def between(self, x):
        return x.reshape(len(x), 4, 4, *x.shape[2:]).flip(2).reshape(len(x), 16, *x.shape[2:])


def parametrised():
    model = Plain()
    torch.nn.utils.parametrizations.weight_norm(model.b)
    return model


def hooked(norm):
    model = Plain()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        norm(model.b)
    return model


def with_mask():
    import torch.nn.utils.prune as masks

    model = Plain()
    masks.l1_unstructured(model.b, "weight", amount=0.5)
    return model


def tied():
    model = Plain()
    model.c = nn.Conv2d(16, 16, 3, padding=1)
    model.head = nn.Linear(16, 4)
    model.c.weight = model.b.weight
    return model


class TwoStreams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 16), nn.Linear(64, 16)
        self.attention, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 4)

    def forward(self, x):
        x = x.flatten(2)
        return self.head(self.attention(self.a(x), self.b(x), self.b(x))[0].mean(1))


REFUSED = {
    "parametrised": (parametrised, r"layer b .*weight_norm.*remove_parametrizations\(layer, 'weight'\)"),
    "weight norm": (lambda: hooked(torch.nn.utils.weight_norm), r"layer b .*remove_weight_norm\(layer, 'weight'\)"),
    "spectral norm": (
        lambda: hooked(torch.nn.utils.spectral_norm),
        r"layer b .*remove_spectral_norm\(layer, 'weight'\)",
    ),
    "mask": (with_mask, r"layer b .*prune\.remove\(layer, 'weight'\)"),
    "shared weight": (tied, r"c\.weight and b\.weight are one shared parameter"),
    "buffer": (Buffered, r"buffer mean .*16 channels"),
    "parameter of two dimensions": (Bilinear, r"parameter map \(1, 16, 16, 1\): which dimension"),
    "counted channels": (CountsItsChannels, r"the model \(CountsItsChannels\) counts its channels"),
    "two streams": (TwoStreams, r"two different streams"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_and_left_alone(name):
    build, message = REFUSED[name]
    model = build().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    images = torch.randn(2, 3, 18, 18) if name != "two streams" else torch.randn(2, 3, 8, 8)
    with pytest.raises(PruningError, match=message) as caught:
        cuq.prune(model, images, sparsity=0.5, round_to=1)
    assert "\n" not in str(caught.value)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all("forward" not in vars(m) for m in model.modules())


def test_tracing_leaves_no_trace():
    model = copy.deepcopy(Buffered())
    model.a.requires_grad_(False)
    buffer = model.mean
    with pytest.raises(PruningError, match="buffer mean"):
        dependency_groups(model, torch.randn(1, 3, 18, 18))
    assert model.mean is buffer
    assert type(model.mean) is torch.Tensor
    assert not model.a.weight.requires_grad
    assert "mean" not in dict(model.named_parameters())


def test_indexed_parameters_keep_their_group(caplog):
    with caplog.at_level(logging.INFO):
        result = cuq.prune(Ambiguous(), torch.randn(1, 3, 18, 18), sparsity=0.5, round_to=1)
    assert [layer.name for layer in result.layers] == ["c"]
    assert "keeps its channels: map does more than scale or shift them" in caplog.text


@pytest.mark.parametrize("frozen", ["a", "b", "c"])
def test_frozen_layers_are_left_alone_and_so_is_what_is_added_to_them(frozen):
    model = randomise(Plain()).double()
    model.get_submodule(frozen).requires_grad_(False)
    images = torch.randn(2, 3, 18, 18, dtype=torch.double)
    if frozen == "c":  # it reads the first group, and makes the other
        with pytest.raises(PruningError, match="frozen"):
            cuq.prune(model, images, sparsity=0.5, round_to=1)
        return
    result = cuq.prune(model, images, sparsity=0.5, round_to=1)
    assert [layer.name for layer in result.layers] == ["c"]
    assert torch.equal(result.model.get_submodule(frozen).weight, model.get_submodule(frozen).weight)
    assert not result.model.get_submodule(frozen).weight.requires_grad
    oracle = masked(model, images, {"c": result.layers[0].removed})
    with torch.no_grad():
        assert relative_difference(result.model(images), oracle(images)) <= 1e-9


def test_models_that_run_only_at_other_sizes():
    with pytest.raises(ModelError, match=r"shape \(3, 48, 48\).*Wrong image height"):
        cuq.prune(vision_transformer.VisionTransformer(32, 8, 1, 4, 32, 64), torch.randn(1, 3, 48, 48), sparsity=0.5)
    with pytest.raises(PruningError, match=r"cannot be traced on images of shape \(3, 9, 9\): "):
        dependency_groups(without_warnings("alexnet"), torch.randn(1, 3, 9, 9))
