"""What an uncertainty method is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from compress_uq.stages import Origin
from compress_uq.uq.members import Members

__all__ = ["Method"]


@dataclass(frozen=True)
class Method(ABC):
    """The configuration of a method; it acts before fine-tuning (`prepare`) and after it (`fit`)."""

    name: ClassVar[str]

    @abstractmethod
    def prepare(self, model: nn.Module, origin: Origin) -> nn.Module:
        """A copy of the model as it has to be fine-tuned."""

    def is_prepared(self, model: nn.Module) -> bool:
        """False for a model that `prepare` would have changed before it was trained."""
        return True

    def as_prepared(self, model: nn.Module) -> Method:
        """The same method with every choice made as `prepare` made it for this model."""
        return self

    @abstractmethod
    def fit(self, model: nn.Module, origin: Origin) -> Members:
        """The members, from a model that `prepare` made, or from a plain one where the method allows it."""

    @abstractmethod
    def restore(self, network: nn.Module, structure: Mapping[str, Any]) -> Members:
        """Members of the right shapes, their tensors still to be loaded, from what `Members.structure` told."""

    @abstractmethod
    def describe(self, model: nn.Module, origin: Origin) -> dict[str, object]:
        """The plan in plain values: what will be done to this model, and what a prediction will cost."""
