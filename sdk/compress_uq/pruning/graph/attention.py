"""Attention as a block: which layers a stream's channels run through, head by head."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress_uq.errors import PruningError
from compress_uq.pruning.graph.block import Block, Share

__all__ = ["AttentionAsItIs", "FusedAttention", "TorchAttention"]


class FusedAttention(Block):
    """Self-attention with one linear layer for queries, keys and values, split into heads as (3, heads, width).

    Its inner width is the width of the stream, as in `B, N, C = x.shape; ...reshape(B, N, 3, heads, C // heads)`:
    a channel takes the query, key and value of its number with it, the same places in every head.
    """

    straight = True
    names = (("qkv", "proj", "num_heads"), ("to_qkv", "merge", "n_heads"))

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """True for modules laid out so, by the names that torchvision and timm use."""
        return any(cls._fits(module, *names) for names in cls.names)

    @staticmethod
    def _fits(module: nn.Module, qkv_name: str, proj_name: str, heads_name: str) -> bool:
        qkv, proj = getattr(module, qkv_name, None), getattr(module, proj_name, None)
        return (
            isinstance(qkv, nn.Linear)
            and isinstance(proj, nn.Linear)
            and isinstance(getattr(module, heads_name, None), int)
            and qkv.out_features == 3 * qkv.in_features == 3 * proj.in_features == 3 * proj.out_features
            and "rope" not in inspect.signature(module.forward).parameters
            and not any(True for name in ("q_norm", "k_norm", "norm", "gate") for _ in _parameters(module, name))
        )

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.qkv, self.proj, heads = next(names for names in self.names if self._fits(module, *names))
        self.heads: int = getattr(module, heads)

    @property
    def channels(self) -> tuple[int, int]:
        """The stream's width, twice."""
        width = self.module.get_submodule(self.qkv).in_features
        return width, width  # type: ignore[return-value]

    def shares(self, side: str) -> Sequence[Share]:
        """The same on either side."""
        inner = Share(self.qkv, "out", repeats=3, parts=self.heads)
        return (Share(self.proj, "out"), Share(self.qkv, "in"), inner, Share(self.proj, "in", parts=self.heads))

    def shape(self, images: Tensor) -> Sequence[int]:
        """Its input's."""
        return images.shape

    def inner_groups(self) -> Sequence[Sequence[Share]]:
        """Hidden units of the network that makes a relative position bias (Swin v2)."""
        bias = getattr(self.module, "cpb_mlp", None)
        if not isinstance(bias, nn.Sequential):
            return ()
        layers = [f"cpb_mlp.{i}" for i, layer in enumerate(bias) if isinstance(layer, nn.Linear)]
        return [(Share(a, "out"), Share(b, "in")) for a, b in itertools.pairwise(layers)]

    def parameters(self) -> Sequence[str]:
        """Biases that are added without the layer knowing (timm's Swin v2)."""
        return [n for n in ("q_bias", "k_bias", "v_bias") if isinstance(getattr(self.module, n, None), Tensor)]

    def after_removal(self, before: int) -> None:
        """Widths that the module notes, and the scale of its scores."""
        width = self.channels[0]
        for name, size in {"head_dim": width // self.heads, "attn_dim": width, "dim": width}.items():
            if type(getattr(self.module, name, None)) is int:
                setattr(self.module, name, size)
        if self._scale_follows_width():
            qkv = self.module.get_submodule(self.qkv)
            _scale_queries(qkv.weight, qkv.bias, width, before)  # type: ignore[arg-type]

    def _scale_follows_width(self) -> bool:
        """Whether forward() divides the scores by the root of the width that it sees then, not by a stored scale."""
        if hasattr(self.module, "logit_scale"):
            return False
        stored = hasattr(self.module, "scale") or hasattr(self.module, "scale_factor")
        return bool(getattr(self.module, "fused_attn", not stored))


class AttentionAsItIs(Block):
    """Attention whose inner width is its own affair (timm's with rotary positions or norms): only its ends change."""

    straight = True

    @staticmethod
    def matches(module: nn.Module) -> bool:
        """True for what has the layers of fused attention, and notes its own inner width."""
        qkv, proj = getattr(module, "qkv", None), getattr(module, "proj", None)
        return (
            isinstance(qkv, nn.Linear)
            and isinstance(proj, nn.Linear)
            and qkv.in_features == proj.out_features
            and type(getattr(module, "attn_dim", None)) is int
        )

    @property
    def channels(self) -> tuple[int, int]:
        """The stream's width, twice."""
        width: int = self.module.qkv.in_features  # type: ignore[assignment, union-attr]
        return width, width

    def shares(self, side: str) -> Sequence[Share]:
        """The same on either side."""
        gate = [Share("gate", "in")] if isinstance(getattr(self.module, "gate", None), nn.Linear) else []
        return (Share("proj", "out"), Share("qkv", "in"), *gate)

    def shape(self, images: Tensor) -> Sequence[int]:
        """Its input's."""
        return images.shape


class TorchAttention(Block):
    """`nn.MultiheadAttention` of a stream with itself; the inner width is the stream's."""

    straight = True

    @staticmethod
    def matches(module: nn.Module) -> bool:
        """True for torch's own class with equal widths."""
        return type(module) is nn.MultiheadAttention and module.in_proj_weight is not None and module.bias_k is None

    @property
    def channels(self) -> tuple[int, int]:
        """The stream's width, twice."""
        return self.module.embed_dim, self.module.embed_dim  # type: ignore[return-value]

    def shares(self, side: str) -> Sequence[Share]:
        """The same on either side."""
        heads: int = self.module.num_heads  # type: ignore[assignment]
        inner = Share("out_proj", "in", parts=heads, is_cut=False)
        return Share("out_proj", "out", is_cut=False), Share("", "in", parts=heads), inner

    def shape(self, images: Tensor) -> Sequence[int]:
        """Its input's."""
        return images.shape

    def stand_in(self, images: Tensor, *others: Any, **options: Any) -> Any:
        """As the module is called: query, key, value."""
        key_value = (*others, *(options[n] for n in ("key", "value") if n in options))[:2]
        if any(other is not images for other in key_value):
            raise PruningError(
                "attention between two different streams cannot be pruned: the widths of nn.MultiheadAttention are tied"
            )
        return super().stand_in(images), None

    def after_removal(self, before: int) -> None:
        """Widths that the module notes, and the scale of its scores."""
        module = self.module
        _scale_queries(module.in_proj_weight, module.in_proj_bias, self.channels[0], before)  # type: ignore[arg-type]


def _parameters(module: nn.Module, name: str) -> Iterator[nn.Parameter]:
    child = getattr(module, name, None)
    if isinstance(child, nn.Module):
        yield from child.parameters()


def _scale_queries(weight: nn.Parameter, bias: nn.Parameter | None, width: int, before: int) -> None:
    """Keep the scores what they were: forward() divides them by the root of a narrower head now."""
    with torch.no_grad():
        weight[:width] *= math.sqrt(width / before)
        if bias is not None:
            bias[:width] *= math.sqrt(width / before)
