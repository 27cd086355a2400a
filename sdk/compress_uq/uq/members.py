"""The waist of the package: images in, logits of all members out, (members, batch, classes)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from compress_uq.errors import UncertaintyError
from compress_uq.models import as_logits

__all__ = ["Members", "SingleMember"]


class Members(nn.Module, ABC):
    """A network, or several, or one with random parts, answering for all members at once."""

    count: int
    """T, the number of members."""
    network: nn.Module
    """The network that all members share."""
    sampling: str = "fixed"
    """`fixed`, `seeded` or `random`."""

    @abstractmethod
    def forward(self, images: Tensor, seed: Tensor | None = None) -> Tensor:
        """Images (N, C, H, W) to logits (T, N, K) float32; `seed` (N,) int64 where the sampling is seeded."""

    def structure(self) -> dict[str, Any]:
        """What `Method.restore` needs besides the network and the tensors; plain values."""
        return {"members": self.count}

    def with_sampling(self, sampling: str) -> Members:
        """A copy that samples in another mode.

        Raises:
            UncertaintyError: nothing is sampled.
        """
        if sampling == "fixed":
            return self
        raise UncertaintyError(f"sampling {sampling!r}: nothing is sampled here, export with 'fixed'")


class SingleMember(Members):
    """One network as it is."""

    count = 1

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, seed: Tensor | None = None) -> Tensor:
        """Images (N, C, H, W) to logits (1, N, K) float32."""
        return as_logits(self.network(images)).float().unsqueeze(0)
