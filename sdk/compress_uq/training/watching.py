"""What a training tells, and who may watch it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

__all__ = ["AfterBackward", "Epoch", "Observer"]

AfterBackward = Callable[[int, int], None]
"""Called between the backward pass and the optimiser's step with (steps done, steps in all); may change gradients."""


class Observer(Protocol):
    """Watches a training's weights; its state is saved with the training's, so that both go on together."""

    configuration: str
    """All that its state depends on besides the training: a training goes on from the same alone."""

    def after_step(self, done: int, total: int, lr: float) -> None:
        """Called after each of the optimiser's `total` steps, `done` of them made, gradients still in place."""

    def state_dict(self) -> dict[str, Tensor]:
        """What it holds: what is saved with every epoch, and what the method makes its members of."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what was held."""


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave, on the augmented training images and in training mode."""

    loss: float
    accuracy: float
    seconds: float
