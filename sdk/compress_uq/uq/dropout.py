"""A network with dropout at chosen sites that answers for T members in one pass.

What comes before the first site is computed once. From there on the T members lie in the batch axis, as T * N images,
so that every later layer sees one large batch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from compress_uq.cost import count_macs
from compress_uq.errors import UncertaintyError
from compress_uq.models import as_logits
from compress_uq.uq.connections import grouped_layer
from compress_uq.uq.features import tap_head
from compress_uq.uq.hooks import Hook, bare_copy, replace_forward
from compress_uq.uq.masks import hashed_masks, random_masks, stratified_masks
from compress_uq.uq.members import Members
from compress_uq.uq.sites import Site

__all__ = ["SampledDropout", "draw_masks", "find_fold", "restored", "sampled_macs"]

_SEED: ContextVar[Tensor | None] = ContextVar("seed", default=None)
_GIVEN: ContextVar[Sequence[Tensor] | None] = ContextVar("given", default=None)
"""The masks of one member, while it runs alone."""


class _Repeat(Hook):
    """Before a module: every image T times, member by member."""

    def __init__(self, members: int) -> None:
        self._members = members

    def __call__(self, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if _GIVEN.get() is not None:
            return inputs
        return tuple(_repeat(i, self._members) if isinstance(i, Tensor) else i for i in inputs)


def _repeat(images: Tensor, members: int) -> Tensor:
    return images.unsqueeze(0).expand(members, *images.shape).flatten(0, 1)


class _MaskHook(Hook):
    def __init__(self, masked: _Masked) -> None:
        self._masked = masked

    def __call__(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return self._masked(output)  # type: ignore[no-any-return]


class _WeightsHook(Hook):
    """In place of a layer's forward: each member with its own weights."""

    def __init__(self, masked: _Masked, layer: nn.Module) -> None:
        self._masked, self._layer = masked, layer

    def __call__(self, inputs: Tensor) -> Tensor:
        return self._masked.layer(self._layer, inputs)


class _Masked(nn.Module):
    """The masks of one site for all members; `first` folds the members into the batch."""

    masks: Tensor

    def __init__(self, site: Site, members: int, salt: int, first: bool, masks: Tensor) -> None:
        super().__init__()
        self.site, self.members, self.salt, self.first = site, members, salt, first
        self.sampling = "fixed"
        self.register_buffer("masks", masks)

    def attach(self, module: nn.Module) -> None:
        """Take effect at the module of the site."""
        if self.site.of_weights:
            replace_forward(module, _WeightsHook(self, module))
        else:
            module.register_forward_hook(_MaskHook(self))

    def forward(self, activations: Tensor) -> Tensor:
        given = _GIVEN.get()
        if given is not None:
            return activations * given[self.salt].to(activations.dtype)
        split = activations.unsqueeze(0) if self.first else activations.unflatten(0, (self.members, -1))
        return (split * self.draw(split[0]).to(split.dtype)).flatten(0, 1)

    def layer(self, layer: nn.Module, inputs: Tensor) -> Tensor:
        """What a layer returns when each member drops its own connections, the same for all images of a call."""
        weight = layer.weight
        assert isinstance(weight, Tensor)
        given = _GIVEN.get()
        if given is not None:
            return grouped_layer(layer, inputs, weight * given[self.salt].to(weight.dtype))
        folded = _repeat(inputs, self.members) if self.first else inputs
        masks = self.draw(inputs[:1]).flatten(0, 1)
        return grouped_layer(layer, folded, weight * masks.to(weight.dtype))

    def draw(self, one: Tensor) -> Tensor:
        """(T, 1, *shape) for fixed masks, (T, N, *shape) for those of each of N images, that `one` has in front."""
        if self.sampling == "fixed":
            return self.masks.unsqueeze(1)
        if self.sampling == "random":
            return random_masks(self.members, one, self.site.shape, self.site.p)
        seed = _SEED.get()
        if seed is None:
            raise UncertaintyError(
                "seeded sampling needs a seed per image: model(images, seed), seed int64 of shape (N,)"
            )
        return hashed_masks(self.members, seed, self.site.shape, self.site.p, self.salt)


class SampledDropout(Members):
    """T members of one network, told apart by their dropout masks.

    `forward` folds them into the batch; `branch` runs one of them alone.

    Args:
        network: the trained network; copied, in eval.
        sites: where it drops, in the order they run.
        members: T.
        seed: draws the fixed masks.
        fold: the module whose input is repeated T times; "" is the whole network, None repeats at the first site.
        masks: per site (T, *shape), instead of drawing them.
        head: the classifier, where its inputs may be asked for.
        modes: how it may sample; by default all that its sites allow.
        found: what was found when the masks were chosen; plain values.
    """

    layouts = ("fold", "unroll")

    def __init__(
        self,
        network: nn.Module,
        sites: Sequence[Site],
        members: int,
        *,
        seed: int = 0,
        fold: str | None = None,
        masks: Sequence[Tensor] | None = None,
        head: str | None = None,
        modes: Sequence[str] | None = None,
        found: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__()
        self.found = dict(found or {})
        self.modes = tuple(modes) if modes is not None else _modes(sites)
        self.count, self.sites, self.fold, self.head = members, tuple(sites), fold, head
        self.network = bare_copy(network).eval().requires_grad_(False)
        masks = draw_masks(sites, members, seed) if masks is None else masks
        device = next((p.device for p in self.network.parameters()), torch.device("cpu"))
        made = [
            _Masked(site, members, salt, first=salt == 0 and fold is None, masks=mask.to(device))
            for salt, (site, mask) in enumerate(zip(self.sites, masks, strict=True))
        ]
        self.masked = nn.ModuleList(made)
        for masked in made:
            masked.attach(self.network.get_submodule(masked.site.module))
        if fold:
            self.network.get_submodule(fold).register_forward_pre_hook(_Repeat(members))
        if head is not None:
            tap_head(self.network, head)

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The one that all members share."""
        return (self.network,)

    def forward(self, images: Tensor, seed: Tensor | None = None) -> Tensor:
        """Images (N, C, H, W) to logits (T, N, K) float32."""
        token = _SEED.set(self._seeds(seed))
        try:
            folded = _repeat(images, self.count) if self.fold == "" else images
            logits = as_logits(self.network(folded)).float()
        finally:
            _SEED.reset(token)
        members: Tensor = logits.unflatten(0, (self.count, -1))
        return members

    def draw(self, images: Tensor, seed: Tensor | None = None) -> tuple[Tensor, ...]:
        """Masks of every site, (T, N, *shape), or (T, 1, *shape) alike for all images."""
        token = _SEED.set(self._seeds(seed))
        try:
            return tuple(m.draw(images[:1] if m.site.of_weights else images) for m in self.masked)  # type: ignore[operator, union-attr]
        finally:
            _SEED.reset(token)

    def branch(self, images: Tensor, masks: Sequence[Tensor]) -> Tensor:
        """One member's logits (N, K) float32, given the masks of each site, (N, *shape) or (1, *shape)."""
        token = _GIVEN.set(masks)
        try:
            return as_logits(self.network(images)).float()
        finally:
            _GIVEN.reset(token)

    def _of_images(self, vectors: Tensor, logits: Tensor) -> Tensor:
        """The members' mean; before the first site there is nothing to average."""
        if self.fold is None and self.sites[0].module == self.head:
            return vectors
        members: Tensor = vectors.unflatten(0, (self.count, -1))
        return members.mean(0)

    def structure(self) -> dict[str, Any]:
        """Members, head, sites and fold."""
        return {
            **super().structure(),
            "fold": self.fold,
            "sites": [asdict(site) for site in self.sites],
        }

    def with_sampling(self, sampling: str) -> SampledDropout:
        """A copy whose masks are `fixed`, `seeded` (from a seed per image) or `random` (fresh at each call).

        Raises:
            UncertaintyError: no such mode here.
        """
        if sampling not in self.modes:
            raise UncertaintyError(f"sampling {sampling!r}: these members sample in the mode {' or '.join(self.modes)}")
        other = copy.deepcopy(self)
        other.sampling = sampling
        if sampling != "fixed":
            of_fixed_masks = ("fidelity", "not_compared")
            other.found = {name: value for name, value in self.found.items() if name not in of_fixed_masks}
        for masked in other.masked:
            masked.sampling = sampling  # type: ignore[assignment]
        return other

    def _seeds(self, seed: Tensor | None) -> Tensor | None:
        if seed is not None and self.sampling != "seeded":
            raise UncertaintyError(f"a seed was given, but the sampling is {self.sampling!r}: only 'seeded' takes one")
        return seed


def restored(network: nn.Module, structure: Mapping[str, Any], modes: Sequence[str] | None = None) -> SampledDropout:
    """Members with masks of the right shapes, their tensors still to be loaded, from `SampledDropout.structure`."""
    sites = tuple(Site(**{**site, "shape": tuple(site["shape"])}) for site in structure["sites"])
    return SampledDropout(
        network,
        sites,
        structure["members"],
        fold=structure["fold"],
        masks=[torch.zeros(structure["members"], *site.shape) for site in sites],
        head=structure.get("head"),
        modes=modes,
        found=structure.get("found"),
    )


def draw_masks(sites: Sequence[Site], members: int, seed: int) -> list[Tensor]:
    """Fixed masks (T, *shape) of every site."""
    generator = torch.Generator().manual_seed(seed)
    return [stratified_masks(members, site.shape, site.p, generator) for site in sites]


def _modes(sites: Sequence[Site]) -> tuple[str, ...]:
    """A seed per image would need weights per image where connections are dropped."""
    if any(site.of_weights for site in sites):
        return ("fixed", "random")
    return ("fixed", "seeded", "random")


def sampled_macs(network: nn.Module, sites: Sequence[Site], fold: str | None, example: Tensor) -> tuple[int, int]:
    """MACs of one image before the members part, and of one member after it."""
    one, two = (count_macs(SampledDropout(network, sites, members, fold=fold), example[:1]) for members in (1, 2))
    return one - (two - one), two - one


def find_fold(network: nn.Module, sites: Sequence[Site], example: Tensor) -> str | None:
    """The latest point from which the members can share the batch axis.

    At the first site where that gives the members' own answers, else (a skip connection leads around it) at the input
    of the innermost module around it that does. Decided by comparing numbers, on two images and three members.

    Raises:
        UncertaintyError: no point does: the network mixes the images of a batch.
    """
    generator = torch.Generator().manual_seed(0)
    masks = [stratified_masks(3, site.shape, max(site.p, 0.3), generator) for site in sites]
    pair = torch.cat([example[:1], example[:1].flip(-1) + 0.5])
    with torch.no_grad():
        wanted = torch.cat(
            [SampledDropout(network, sites, 1, masks=[m[t : t + 1] for m in masks])(pair) for t in range(3)]
        )
        for fold in (None, *_ancestors(sites[0].module)):
            try:
                got = SampledDropout(network, sites, 3, fold=fold, masks=masks)(pair)
            except (RuntimeError, ValueError):
                continue  # shapes clash where a skip connection leads around the fold
            scale = float(wanted.abs().max()) + 1e-6
            if got.shape == wanted.shape and float((got - wanted).abs().max()) <= 1e-4 * scale:
                return fold
    raise UncertaintyError(
        "the model's answer for an image depends on the other images of the batch: it cannot be sampled"
    )


def _ancestors(name: str) -> list[str]:
    """The modules around a module, innermost first, itself included, the whole network last."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts), -1, -1)]
