"""A network with dropout at chosen sites, to train: masks at random, or a fixed set of masks dealt to the images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress_uq.models import as_logits
from compress_uq.uq.connections import grouped_layer
from compress_uq.uq.hooks import Hook, replace_forward
from compress_uq.uq.sites import Site

__all__ = ["DropoutNetwork"]

_WEIGHT_MASKS = 8
"""Draws of a layer's dropped connections in one training batch: a draw for each image would need its own weights."""


class DropoutNetwork(nn.Module):
    """A classifier with dropout at the given sites.

    While training, masks are drawn at random, or dealt from `masks`, image by image in turn. In eval nothing is
    dropped; with `masks` each unit is then scaled by the share of masks that keep it, as it was on average.

    Args:
        network: the classifier; hooks are put into it.
        sites: where it drops.
        masks: per site (M, *shape) of 0 and 1; the model's own dropout at these sites is off then.
    """

    def __init__(self, network: nn.Module, sites: Sequence[Site], masks: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.network = network
        self.sites = tuple(sites)
        self.inserted = nn.ModuleList()
        for number, site in enumerate(sites):
            module = network.get_submodule(site.module)
            if hasattr(module, "p"):  # a dropout layer: as the site has it, or silent beside new dropout
                module.p = site.p if site.own else 0.0  # type: ignore[assignment]
            if site.own:
                continue
            if site.of_weights:
                self.inserted.append(_ConnectionDropout(site))
                replace_forward(module, _InPlaceOf(self.inserted[-1], module))
            else:
                self.inserted.append(_ActivationDropout(site) if masks is None else _DealtMasks(masks[number]))
                module.register_forward_hook(_After(self.inserted[-1]))

    @property
    def masks(self) -> tuple[Tensor, ...]:
        """The masks that are dealt to the images, (M, *shape) per site; none where they are random."""
        return tuple(module.masks for module in self._dealt())

    @property
    def trained_steps(self) -> int:
        """Batches that the dealt masks were trained on."""
        return max((int(module.batches) for module in self._dealt()), default=0)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, K)."""
        return as_logits(self.network(images))

    def _dealt(self) -> list[_DealtMasks]:
        return [module for module in self.inserted if isinstance(module, _DealtMasks)]


class _After(Hook):
    """After a module: drop of what it returned."""

    def __init__(self, dropped: nn.Module) -> None:
        self._dropped = dropped

    def __call__(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return self._dropped(output)  # type: ignore[no-any-return]


class _InPlaceOf(Hook):
    """In place of a layer's forward."""

    def __init__(self, dropped: nn.Module, layer: nn.Module) -> None:
        self._dropped, self._layer = dropped, layer

    def __call__(self, inputs: Tensor) -> Tensor:
        return self._dropped(self._layer, inputs)  # type: ignore[no-any-return]


class _ActivationDropout(nn.Module):
    """Drops parts of an image's activations at random while training; masks of the site's shape."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.shape, self.p = site.shape, site.p

    def forward(self, activations: Tensor) -> Tensor:
        if not self.training:
            return activations
        keep = torch.rand(len(activations), *self.shape, device=activations.device) >= self.p
        return activations * (keep.to(activations.dtype) / (1 - self.p))


class _ConnectionDropout(nn.Module):
    """Drops single weights at random while training, in another draw for each of a few groups of images."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.shape, self.p = site.shape, site.p

    def forward(self, layer: nn.Module, inputs: Tensor) -> Tensor:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if not self.training:
            return grouped_layer(layer, inputs, weight.unsqueeze(0))
        groups = math.gcd(len(inputs), _WEIGHT_MASKS)
        keep = torch.rand(groups, *self.shape, device=weight.device) >= self.p
        return grouped_layer(layer, inputs, weight * (keep.to(weight.dtype) / (1 - self.p)))


class _DealtMasks(nn.Module):
    """Image i of a training batch gets mask i mod M."""

    masks: Tensor
    batches: Tensor

    def __init__(self, masks: Tensor) -> None:
        super().__init__()
        self.register_buffer("masks", masks)
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, activations: Tensor) -> Tensor:
        if not self.training:
            return activations * self.masks.mean(0).to(activations.dtype)
        self.batches += 1
        turn = torch.arange(len(activations), device=activations.device) % len(self.masks)
        return activations * self.masks[turn].to(activations.dtype)
