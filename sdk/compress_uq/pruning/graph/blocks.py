"""Blocks whose inside a trace cannot follow: attention, patch merging, channel shuffle.

While the model is traced, such a block is one opaque operation. What its channels mean is written down here instead:
which of its layers use an input channel, which make an output channel, and which groups live wholly inside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torchvision.models.shufflenetv2 import InvertedResidual

from compress_uq.pruning.graph.attention import AttentionAsItIs, FusedAttention, TorchAttention
from compress_uq.pruning.graph.block import Block, Share

__all__ = ["Block", "Share", "find_blocks", "standing_in"]


class PatchMerging(Block):
    """Four neighbours side by side, normalised, to one: the down-sampling of Swin."""

    straight = False

    @staticmethod
    def matches(module: nn.Module) -> bool:
        """True for torchvision's and timm's, whether they normalise before the reduction or after it."""
        reduction, norm = getattr(module, "reduction", None), getattr(module, "norm", None)
        return (
            isinstance(reduction, nn.Linear)
            and isinstance(norm, nn.LayerNorm)
            and type(getattr(module, "dim", None)) is int
            and reduction.in_features == 4 * module.dim  # type: ignore[operator]
        )

    @property
    def _reduction(self) -> nn.Linear:
        return self.module.reduction  # type: ignore[return-value]

    @property
    def channels(self) -> tuple[int, int]:
        """How many come in and go out."""
        return self._reduction.in_features // 4, self._reduction.out_features

    def shares(self, side: str) -> Sequence[Share]:
        """The layers on one side."""
        first = self.module.norm.normalized_shape[0] == self._reduction.in_features  # type: ignore[union-attr, index]
        if side == "in":
            return (Share("norm", "out", 4), Share("reduction", "in", 4))[not first :]
        return (Share("reduction", "out"), Share("norm", "out"))[: 1 if first else 2]

    def shape(self, images: Tensor) -> Sequence[int]:
        """Half as high and wide, or as the stride says."""
        batch, height, width, _ = images.shape
        return batch, (height + 1) // 2, (width + 1) // 2, self._reduction.out_features

    def after_removal(self, before: int) -> None:
        """The width that the module notes."""
        setattr(self.module, "dim", self.channels[0])  # noqa: B010  typed as a tensor or a module


class ShuffleUnit(Block):
    """ShuffleNetV2's unit: two halves side by side, then interleaved.

    The stream between units keeps all its channels: every unit cuts it in the middle after a shuffle, so that any
    channel's place decides where it is used for all units to come. What is inside a unit, and its input where that is
    no shuffled stream, can go.
    """

    straight = False

    @staticmethod
    def matches(module: nn.Module) -> bool:
        """True for torchvision's class."""
        return isinstance(module, InvertedResidual)

    @property
    def _unit(self) -> InvertedResidual:
        assert isinstance(self.module, InvertedResidual)
        return self.module

    @property
    def channels(self) -> tuple[int, int]:
        """How many come in and go out."""
        first = self._unit.branch2[0].in_channels
        return first * (2 if self._unit.stride == 1 else 1), 2 * self._unit.branch2[5].out_channels

    def shares(self, side: str) -> Sequence[Share]:
        """The layers on one side."""
        if side == "out" or self._unit.stride == 1:
            return ()
        return (
            Share("branch1.0", "out"),
            Share("branch1.1", "out"),
            Share("branch1.2", "in"),
            Share("branch2.0", "in"),
        )

    def shape(self, images: Tensor) -> Sequence[int]:
        """Half as high and wide, or as the stride says."""
        batch, _, height, width = images.shape
        stride = self._unit.stride
        return batch, self.channels[1], -(-height // stride), -(-width // stride)

    def inner_groups(self) -> Sequence[Sequence[Share]]:
        """The middle of the second branch."""
        names = {0: "out", 1: "out", 3: "out", 4: "out", 5: "in"}
        return [[Share(f"branch2.{i}", side) for i, side in names.items()]]


_KINDS: tuple[tuple[Callable[[nn.Module], bool], type[Block]], ...] = tuple(
    (kind.matches, kind) for kind in (FusedAttention, AttentionAsItIs, TorchAttention, PatchMerging, ShuffleUnit)
)


def find_blocks(model: nn.Module) -> dict[nn.Module, Block]:
    """Every module of the model that is traced as one block."""
    found: dict[nn.Module, Block] = {}
    for module in model.modules():
        for matches, kind in _KINDS:
            if matches(module):
                found[module] = kind(module)
                break
    return found


@contextmanager
def standing_in(blocks: dict[nn.Module, Block]) -> Iterator[None]:
    """Inside, each block's forward() is one opaque operation."""
    for module, block in blocks.items():
        module.forward = block.stand_in
    try:
        yield
    finally:
        for module in blocks:
            del module.forward
