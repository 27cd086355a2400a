"""Networks in float16, authored in torch: weights and activations in half, norms in full."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from compress_uq.batch_norm import BatchNorm
from compress_uq.uq import Members

__all__ = ["HalfMembers"]

_NORMS = (BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)


class HalfMembers(Members):
    """Members whose networks compute in float16; images in and logits out are float32.

    Batch norm that follows a convolution is multiplied into it in float32 beforehand; every other norm runs in
    float32, since a variance or its inverse leaves float16's range easily. Tensors outside the networks stay as they
    are.

    Args:
        members: what is copied.
        example: images (N, C, H, W) that they can run on.
    """

    def __init__(self, members: Members, *example: Tensor) -> None:
        super().__init__()
        self.count, self.sampling, self.head, self.found = members.count, members.sampling, members.head, members.found
        self.layouts = members.layouts
        self.members = _folded(members, *example)
        for network in self.members.networks:
            for module in network.modules():
                if isinstance(module, _NORMS):
                    module.register_forward_pre_hook(_to_float)
                    module.register_forward_hook(_to_half)
                else:
                    _halve(module)

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """In float16."""
        return self.members.networks

    def forward(self, images: Tensor, seed: Tensor | None = None) -> Tensor:
        """Logits (T, N, K) float32."""
        return self.members(images.half(), seed)  # type: ignore[no-any-return]

    def with_features(self, images: Tensor, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (T, N, K) and features (G, N, D), float32."""
        return self.members.with_features(images.half(), seed)

    def draw(self, images: Tensor, seed: Tensor | None = None) -> tuple[Tensor, ...]:
        """Masks in float32."""
        return self.members.draw(images, seed)

    def branch(self, images: Tensor, masks: Sequence[Tensor]) -> Tensor:
        """One member's logits (N, K) float32."""
        return self.members.branch(images.half(), masks)


def _halve(module: nn.Module) -> None:
    """What a module itself stores, to float16; its children's is left alone."""
    for name, parameter in module.named_parameters(recurse=False):
        setattr(module, name, nn.Parameter(parameter.half(), requires_grad=False))
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.is_floating_point():
            setattr(module, name, buffer.half())


def _to_float(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.float() if isinstance(value, Tensor) else value for value in inputs)


def _to_half(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output.half()


def _folded(members: Members, *example: Tensor) -> Members:
    """A copy with batch norm multiplied into the convolutions that feed it, where that gives the same answers."""
    plain, folded = copy.deepcopy(members), copy.deepcopy(members)
    for network in folded.networks:
        for conv, norm in _pairs(folded, network, *example):
            _fold(network, conv, norm)
    with torch.no_grad():
        wanted, got = (each.with_sampling("fixed")(example[0]) for each in (plain, folded))
    return folded if torch.allclose(got, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())) else plain


def _pairs(members: Members, network: nn.Module, *example: Tensor) -> list[tuple[str, str]]:
    """Convolutions and the batch norms that read what they return, as far as nobody else looks at either."""
    made: dict[int, tuple[str, Tensor]] = {}
    calls: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    handles = []

    def after(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1
            if isinstance(_module, BatchNorm) and id(inputs[0]) in made:
                found.append((made[id(inputs[0])][0], name))
            elif not isinstance(_module, BatchNorm):
                made[id(output)] = (name, output)  # kept alive, so that no other tensor gets its id

        return hook

    for name, module in network.named_modules():
        untouched = not module._forward_hooks and not module._forward_pre_hooks and "forward" not in vars(module)
        if isinstance(module, nn.modules.conv._ConvNd | BatchNorm) and untouched:
            handles.append(module.register_forward_hook(after(name)))
    with torch.no_grad():
        members(*example)
    for handle in handles:
        handle.remove()
    return [pair for pair in found if calls[pair[0]] == calls[pair[1]] == 1]


def _fold(network: nn.Module, conv_name: str, norm_name: str) -> None:
    conv: Any = network.get_submodule(conv_name)
    norm: Any = network.get_submodule(norm_name)
    transposed = isinstance(conv, nn.modules.conv._ConvTransposeNd)
    if norm.running_mean is None:
        return
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias, transposed
    )
    parent, _, last = norm_name.rpartition(".")
    setattr(network.get_submodule(parent), last, nn.Identity())
