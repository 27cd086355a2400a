"""Maximum softmax probability: the baseline that costs nothing."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from compress_uq.stages import Origin
from compress_uq.uq.base import Method, Trained, describe_networks
from compress_uq.uq.members import Members, SingleMember

__all__ = ["MSP"]


@dataclass(frozen=True)
class MSP(Method):
    """One pass of the network; its confidence is the maximum softmax probability (Hendrycks and Gimpel 2017)."""

    name = "msp"

    def prepare(self, model: nn.Module, origin: Origin) -> nn.Module:
        """A plain copy."""
        return copy.deepcopy(model)

    def fit(self, trained: Trained) -> Members:
        """The network as the only member."""
        return SingleMember(trained.one(self.name), trained.head())

    def restore(self, networks: Sequence[nn.Module], structure: Mapping[str, Any]) -> Members:
        """The network as the only member."""
        return SingleMember(networks[0], structure.get("head"))

    def describe(self, model: nn.Module, origin: Origin) -> dict[str, object]:
        """One pass."""
        return describe_networks(self, 1, model, origin)
