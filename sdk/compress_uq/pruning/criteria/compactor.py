"""Compactors: linear maps of channels after the layers of a group, trained with the model and then folded into it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress_uq.errors import PruningError
from compress_uq.models import ChannelSelect
from compress_uq.pruning.criteria.folding import mix, mix_normed, own_norms, scale
from compress_uq.pruning.graph.groups import Group

__all__ = ["Compactor", "Compactors"]

_CHILD = "compactor"


class Compactor(nn.Module):
    """A matrix, or one factor per channel, on the output of `host`; its state is in the model's state dict."""

    weight: Tensor
    velocity: Tensor
    masked: Tensor

    def __init__(self, host: nn.Module, like: Tensor, channels: int, *, mixes: bool, learns: bool = True) -> None:
        super().__init__()
        self.mixes, self.learns = mixes, learns
        self.axis = -1 if isinstance(host, nn.Linear) else 1
        identity = torch.eye(channels) if mixes else torch.ones(channels, 1)
        identity = identity.to(device=like.device, dtype=like.dtype)
        if learns:
            self.weight = nn.Parameter(identity)
            self.register_buffer("velocity", torch.zeros_like(identity))
        else:
            self.register_buffer("weight", identity)
        self.register_buffer("masked", torch.zeros(channels, dtype=torch.bool, device=like.device))

    def forward(self, x: Tensor) -> Tensor:
        """Channels recombined; same shape."""
        if self.mixes:
            # On channels-last images this is a plain matrix product, faster than a 1x1 convolution.
            return F.linear(x.movedim(self.axis, -1), self.weight).movedim(-1, self.axis)
        shape = [1] * x.ndim
        shape[self.axis] = -1
        return x * self.weight.to(x.dtype).view(shape)


@dataclass(frozen=True)
class _Share:
    """A group's rows of a compactor."""

    compactor: Compactor
    rows: Tensor
    channels: Tensor
    """(M,) the group's channel of each of the rows."""


class Compactors:
    """The compactors of some groups of a model, which runs through them until `fold`.

    A channel lives in every layer that makes it, so its rows in all of them are judged, pushed and zeroed together.
    Weighted layers get a matrix, after their batch norm where they have one of their own; other batch norms and
    grouped convolutions get a factor per channel, since they cannot take in a mixture; a `ChannelSelect` gets factors
    that do not learn and end at exactly 0 or 1, since it can take in nothing else.

    Args:
        model: in eval mode; its groups' modules get hooks.
        example: an image batch of the right shape.
        groups: of this model.

    Raises:
        PruningError: a group whose channels would not vanish for all that read them when their rows are zero.
    """

    def __init__(self, model: nn.Module, example: Tensor, groups: Sequence[Group]) -> None:
        self.groups = list(groups)
        self._norms = own_norms(model, example)
        self._compactors: dict[nn.Module, Compactor] = {}
        self._makers: dict[nn.Module, nn.Module] = {}
        for group in self.groups:
            _refuse_fixed_norms(group)
        self._shares = [self._place(group) for group in self.groups]
        self._handles = [
            host.register_forward_hook(lambda _host, _inputs, output, compactor=compactor: compactor(output))
            for host, compactor in self._compactors.items()
        ]
        self._check(model, example)

    def _place(self, group: Group) -> list[_Share]:
        makers = [layer for layer in group.layers if layer.side == "out"]
        normed = {self._norms[layer.module] for layer in makers if layer.module in self._norms}
        shares = []
        for layer in makers:
            if layer.module in normed:
                continue
            host = self._norms.get(layer.module, layer.module)
            if host not in self._compactors:
                compactor = _compactor(layer.module, host)
                if compactor is None:
                    continue
                self._compactors[host] = compactor
                self._makers[host] = layer.module
                host.add_module(_CHILD, compactor)
            compactor = self._compactors[host]
            device = compactor.weight.device
            shares.append(_Share(compactor, layer.indices.to(device), layer.channels.to(device)))
        return shares

    def _check(self, model: nn.Module, example: Tensor) -> None:
        """Zero a random half of every group's rows: their readers must read zeros."""
        kept = {c: c.weight.detach().clone() for c in self._compactors.values()}
        generator = torch.Generator().manual_seed(0)
        chosen = []
        for group in self.groups:
            size = group.channels // group.divisions
            places = torch.randperm(size, generator=generator)[: (size + 1) // 2]
            gone = torch.zeros(group.divisions, size, dtype=torch.bool)
            gone[:, places] = True
            chosen.append(gone.flatten())
        self.zero(chosen)
        images = torch.randn(example.shape, generator=generator).to(example)
        for group, name in zip(self.groups, _first_to_read(model, images, self.groups, chosen), strict=True):
            if name is not None:
                self._detach()
                raise PruningError(
                    f"channels of {group.name} cannot be trained to zero: {name} would still read something else, "
                    "as behind a layer norm or a sigmoid; keep this layer whole, or take another criterion"
                )
        with torch.no_grad():
            for compactor, weight in kept.items():
                compactor.weight.copy_(weight)
                compactor.masked.fill_(False)

    @torch.no_grad()
    def norms(self) -> list[Tensor]:
        """(channels,) on the CPU for each group: its rows' lengths, root mean square over the layers that make it."""
        return [norm.cpu() for norm in self._lengths()]

    def _lengths(self) -> Iterator[Tensor]:
        return (_norm(group, shares) for group, shares in zip(self.groups, self._shares, strict=True))

    def mask(self, masks: Iterable[Tensor]) -> None:
        """Let these channels be forgotten: (channels,) bool for each group."""
        for shares, mask in zip(self._shares, masks, strict=True):
            for share in shares:
                share.compactor.masked[share.rows] = mask.to(share.rows.device)[share.channels]

    def masks(self) -> list[Tensor]:
        """(channels,) bool for each group, on the CPU."""
        found = []
        for group, shares in zip(self.groups, self._shares, strict=True):
            mask = torch.zeros(group.channels, dtype=torch.bool)
            for share in shares:
                mask[share.channels.cpu()] = share.compactor.masked[share.rows].cpu()
            found.append(mask)
        return found

    @torch.no_grad()
    def step(self, lr: float, momentum: float, strength: float, push: float, fade: float) -> None:
        """One step of gradient descent, after which the optimiser finds no gradients (Ding et al. 2021, section 3.3).

        Rows have the gradient of the loss plus that of `strength` times their Euclidean norm; masked rows only that of
        `push` times it, and where they come to zero they stay. Factors that do not learn move by `fade` to 0 or 1.
        """
        lengths = {c: c.weight.new_ones(len(c.weight), 1) for c in self._compactors.values() if c.learns}
        for shares, length in zip(self._shares, self._lengths(), strict=True):
            for share in shares:
                if share.compactor.learns:
                    lengths[share.compactor][share.rows, 0] = length[share.channels]
        for compactor in self._compactors.values():
            weight, masked = compactor.weight, compactor.masked.unsqueeze(1)
            if not compactor.learns:
                weight.add_(torch.where(masked, -fade, fade)).clamp_(0, 1)
                continue
            gradient = weight * torch.where(masked, push, strength) / lengths[compactor].clamp_min(1e-12)
            if weight.grad is not None:
                gradient += weight.grad.masked_fill_(masked, 0)
                weight.grad = None
            velocity = compactor.velocity.mul_(momentum).add_(gradient)
            moved = weight - lr * velocity
            passed = masked & ((moved * weight).sum(1, keepdim=True) <= 0)
            velocity.masked_fill_(passed, 0)
            weight.copy_(moved.masked_fill_(passed, 0))

    @torch.no_grad()
    def zero(self, masks: Sequence[Tensor]) -> None:
        """Rows of these channels become exactly zero; factors that do not learn, 0 or 1."""
        self.mask(masks)
        for compactor in self._compactors.values():
            if not compactor.learns:
                compactor.weight.fill_(1)
            compactor.weight.masked_fill_(compactor.masked.unsqueeze(1), 0)

    @torch.no_grad()
    def fold(self, model: nn.Module, images: Iterable[Tensor]) -> None:
        """Put the compactors into the layers, which answer the same in eval mode, and take them out of the model.

        Batch norms keep their sense: the mean of what they normalise is known, its variance is measured on `images`.
        """
        variances = _output_variances(model, list(self._compactors.values()), images)
        self._detach()
        for host, compactor in self._compactors.items():
            maker, weight = self._makers[host], compactor.weight.detach().double()
            if isinstance(host, ChannelSelect):
                host.index[compactor.masked] = host.in_channels
            elif not compactor.mixes:
                scale(host, weight.flatten())
            elif maker is host:
                mix(maker, weight)
            else:
                mix_normed(maker, host, weight, variances[compactor])

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        for host in self._compactors:
            delattr(host, _CHILD)


def _norm(group: Group, shares: Sequence[_Share]) -> Tensor:
    learning = [share for share in shares if share.compactor.learns]
    sums = learning[0].compactor.weight.new_zeros(2, group.channels)
    for share in learning:
        squares = share.compactor.weight.detach().square().sum(1)[share.rows]
        sums.index_add_(1, share.channels, torch.stack([squares, torch.ones_like(squares)]))
    return (sums[0] / sums[1].clamp_min(1)).sqrt()


def _refuse_fixed_norms(group: Group) -> None:
    """Fresh ones map zero to zero, but not for long."""
    for layer in group.layers:
        if isinstance(layer.module, nn.modules.batchnorm._BatchNorm) and not layer.module.affine:
            raise PruningError(
                f"channels of {group.name} cannot be trained to zero: batch norm {layer.name} has no factors "
                "of its own; keep this layer whole, or take another criterion"
            )


def _compactor(module: nn.Module, host: nn.Module) -> Compactor | None:
    """For the outputs of a layer; None for layers that nothing can be folded into."""
    if isinstance(module, ChannelSelect):
        return Compactor(
            host, torch.empty(0, device=module.index.device), module.out_channels, mixes=False, learns=False
        )
    if isinstance(module, nn.Linear):
        return Compactor(host, module.weight, module.out_features, mixes=True)
    if isinstance(module, nn.modules.conv._ConvNd):
        if module.groups > 1 and module.transposed:
            return None
        return Compactor(host, module.weight, module.out_channels, mixes=module.groups == 1)
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
        return Compactor(host, module.weight, module.num_features, mixes=False)
    return None


def _first_to_read(
    model: nn.Module, images: Tensor, groups: Sequence[Group], gone: Sequence[Tensor]
) -> list[str | None]:
    """For each group the first layer that reads anything but zeros from the channels that are gone."""
    found: list[str | None] = [None] * len(groups)
    handles = []

    def look(index: int, name: str, positions: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            axis = 1 if isinstance(module, nn.modules.conv._ConvNd | ChannelSelect) else -1
            read = inputs[0].movedim(axis, -1)
            if found[index] is None and bool(read[..., positions].count_nonzero()):
                found[index] = name

        return hook

    for index, (group, mask) in enumerate(zip(groups, gone, strict=True)):
        for layer in group.layers:
            if layer.side == "in":
                positions = layer.indices[mask[layer.channels]].to(images.device)
                handles.append(layer.module.register_forward_pre_hook(look(index, layer.name, positions)))
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _output_variances(
    model: nn.Module, compactors: Sequence[Compactor], images: Iterable[Tensor]
) -> dict[Compactor, Tensor]:
    """(channels,) float64 of each compactor's output, over images and places."""
    sums: dict[Compactor, Tensor] = {}
    counts: dict[Compactor, int] = {}

    def add(compactor: Compactor, _inputs: object, output: Tensor) -> None:
        values = output.movedim(compactor.axis, -1).flatten(0, -2).double()
        moments = torch.stack([values.sum(0), values.square().sum(0)])
        sums[compactor] = sums[compactor] + moments if compactor in sums else moments
        counts[compactor] = counts.get(compactor, 0) + len(values)

    handles = [compactor.register_forward_hook(add) for compactor in compactors if compactor.mixes]
    for batch in images:
        model(batch)
    for handle in handles:
        handle.remove()
    means = {compactor: total / counts[compactor] for compactor, total in sums.items()}
    return {compactor: (square - mean.square()).clamp_min(0) for compactor, (mean, square) in means.items()}
