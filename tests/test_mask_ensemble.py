"""Mask ensembles: masks as the paper draws them, dealt while training, fixed ever after."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import compress_uq as cuq
from compress_uq.cost import Cost, count_macs
from compress_uq.errors import InputError, UncertaintyError
from compress_uq.runtime import OnnxPredictor
from compress_uq.stages import Origin
from compress_uq.uq import MaskEnsemble, Trained
from compress_uq.uq.mask_ensemble import overlapping_masks
from small_models import own, randomise, torchvision

ORIGIN = Origin((3, 32, 32), Cost(1, 10**12, 1))


@pytest.mark.parametrize(
    ("masks", "channels", "scale"), [(4, 8, 2.0), (4, 64, 2.0), (8, 45, 3.0), (2, 512, 1.5), (2, 512, 6.0)]
)
def test_masks_have_the_papers_sizes_and_overlap(masks, channels, scale):
    sizes, overlaps = [], []
    for seed in range(20):
        drawn = overlapping_masks(masks, channels, scale, torch.Generator().manual_seed(seed))
        assert drawn.shape == (masks, channels)
        assert set(drawn.unique().tolist()) <= {0.0, 1.0}
        assert len(set(drawn.sum(1).tolist())) == 1
        assert drawn.any(0).all()
        assert len(drawn.unique(dim=0)) == masks
        sizes.append(drawn[0].sum().item())
        pairs = itertools.combinations(drawn.bool(), 2)
        overlaps += [((a & b).sum() / (a | b).sum()).item() for a, b in pairs]
    # Expected number of positions left, m * s * (1 - (1 - 1 / s) ** n), is the number of channels.
    assert sizes[0] * scale * (1 - (1 - 1 / scale) ** masks) == pytest.approx(channels, abs=scale)
    assert np.mean(overlaps) == pytest.approx(1 / (2 * scale - 1), abs=0.06)


def test_options_that_make_no_ensemble():
    with pytest.raises(InputError, match="samples=1"):
        MaskEnsemble(samples=1)
    for scale in (1.0, 7.0, float("nan")):
        with pytest.raises(InputError, match=f"scale={scale}"):
            MaskEnsemble(scale=scale)
    with pytest.raises(UncertaintyError, match="4 channels, at least 8"):
        MaskEnsemble(at="0").describe(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(3600, 2)), ORIGIN)


def test_each_image_trains_one_mask_and_eval_depends_on_no_neighbour():
    model, images = randomise(own("resnet20")), torch.randn(6, 3, 32, 32)
    method = MaskEnsemble(at=("layer3.1", "layer3.2"), samples=3)
    network = method.prepare(model, ORIGIN)
    assert [m.shape for m in network.masks] == [(3, 64, 1, 1)] * 2
    network.train()
    network.network.eval()
    with torch.no_grad():
        got = network(images)
    masks = network.masks
    for image in range(6):
        handles = [
            model.get_submodule(name).register_forward_hook(lambda _m, _i, o, k=mask[image % 3]: o * k)
            for name, mask in zip(("layer3.1", "layer3.2"), masks, strict=True)
        ]
        with torch.no_grad():
            assert torch.allclose(got[image], model(images[image : image + 1])[0], atol=1e-4)
        for handle in handles:
            handle.remove()
    network.eval()
    with torch.no_grad():
        assert torch.allclose(network(images)[2:4], network(images[2:4]), atol=1e-5)
    assert network.trained_steps == 1
    # The members that are deployed are the masks that were trained, and cost what was planned.
    members = method.fit(Trained((network,), ORIGIN))
    assert all(torch.equal(m.masks, mask) for m, mask in zip(members.masked, masks, strict=True))
    with torch.no_grad():
        every = members(images)
    assert torch.allclose(every[torch.arange(6) % 3, torch.arange(6)], got, atol=1e-4)
    assert count_macs(members, images[:1]) == method.plan(model, ORIGIN).macs
    for sampling in ("seeded", "random"):
        with pytest.raises(UncertaintyError, match=f"'{sampling}': these members sample in the mode fixed"):
            members.with_sampling(sampling)


def test_a_models_own_dropout_is_silent_beside_the_masks():
    network = MaskEnsemble().prepare(torchvision("alexnet"), Origin((3, 64, 64), Cost(1, 10**12, 1)))
    assert all(m.p == 0 for m in network.network.modules() if isinstance(m, nn.Dropout))
    assert [tuple(m.shape) for m in network.masks] == [(4, 9216), (4, 4096)]


def test_masks_that_were_not_trained_are_refused(dense, splits):
    pruned = cuq.prune(dense.model, splits.example(), sparsity=0.5)
    with pytest.raises(UncertaintyError, match="trained with its masks"):
        cuq.fit_uncertainty(pruned, method="mask-ensemble")
    with pytest.raises(UncertaintyError, match="at least one epoch"):
        cuq.fit_uncertainty(cuq.finetune(pruned, splits, method="mask-ensemble", epochs=0))


def test_a_bundle_of_a_mask_ensemble(dense, splits, tmp_path):
    bundle = cuq.compress(
        dense.model, splits, sparsity=0.5, epochs=2, uq=MaskEnsemble(sampling_budget=2.0), arch=dense.architecture,
        control=True,
    )  # fmt: skip
    bundle.save(tmp_path / "b")
    loaded = cuq.Bundle.load(tmp_path / "b")
    images = torch.stack([splits.test[n][0] for n in range(9)])
    with torch.no_grad():
        answer = loaded.model(images)
        assert torch.equal(answer.probabilities, bundle.model(images).probabilities)
    got = OnnxPredictor(tmp_path / "b" / "model.onnx")(images.numpy())
    assert np.allclose(got.mutual_information, answer.mutual_information.numpy(), atol=1e-5)
    assert answer.mutual_information.max() > 1e-4
    assert loaded.model.members.count == 4
    with pytest.raises(UncertaintyError, match="fixed"):
        loaded.export_onnx(tmp_path / "seeded.onnx", sampling="seeded")
