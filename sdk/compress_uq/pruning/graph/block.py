"""What is known of a block that tracing takes for one opaque operation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Block", "Share"]


@dataclass(frozen=True)
class Share:
    """A layer inside a block, and where along one of its axes the block's channels lie."""

    name: str
    """Relative to the block."""
    side: str
    repeats: int = 1
    """Channel c lies at c, c + C, ..., c + (repeats - 1) C of the C channels."""
    parts: int = 1
    """The channels fall into this many equal parts that must lose the same places (attention heads)."""
    is_cut: bool = True
    """False where the cut of another share removes its positions too."""


class Block(ABC):
    """One module that is opaque to tracing."""

    straight: bool
    """Output channel c is input channel c, as in a residual branch; otherwise the two sides are separate."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    @abstractmethod
    def channels(self) -> tuple[int, int]:
        """How many come in and go out."""

    @abstractmethod
    def shares(self, side: str) -> Sequence[Share]:
        """The layers on one side (`in` or `out`); all of them on either side of a straight block."""

    @abstractmethod
    def shape(self, images: Tensor) -> Sequence[int]:
        """Of what the block makes from this input."""

    def stand_in(self, images: Tensor, *others: Any, **options: Any) -> Any:
        """What takes the place of the module's forward() during a trace."""
        return _Opaque.apply(images, tuple(self.shape(images)))

    def inner_groups(self) -> Sequence[Sequence[Share]]:
        """Groups of channels that no one outside sees; the first share names the group."""
        return ()

    def parameters(self) -> Sequence[str]:
        """Parameters and buffers (C,) of the module itself that have one value for each channel."""
        return ()

    def after_removal(self, before: int) -> None:  # noqa: B027  most blocks need nothing
        """Set what else depends on the number of channels, of which there were `before`."""


class _Opaque(torch.autograd.Function):
    """Depends on its input, and has a shape."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, shape: tuple[int, ...]) -> Tensor:
        return images.new_zeros(shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError("a trace is not differentiated")
