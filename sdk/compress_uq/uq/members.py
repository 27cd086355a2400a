"""The waist of the package: images in, logits of all members out, (members, batch, classes)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from compress_uq.errors import UncertaintyError
from compress_uq.models import as_logits
from compress_uq.uq.features import head_inputs, tap_head
from compress_uq.uq.hooks import bare_copy

__all__ = ["Fidelity", "Members", "Networks", "SingleMember"]


@dataclass(frozen=True)
class Fidelity:
    """How far the answers of T fixed members are from those of many more, on images that need no label."""

    draws: int
    """Sets of T masks that were compared."""
    kept: int
    """The one that is used, counted from 0."""
    images: int
    """Looked at in all: one half chose the set, the figures below are of the other."""
    reference: int
    """Members that the sets were compared with."""
    spearman: float
    """Rank correlation of the mutual information with the reference's, of the set kept."""
    spearman_median: float
    """The median over the sets."""
    difference: float
    """Mean absolute difference of the mean probabilities to the reference's, of the set kept."""
    difference_median: float


class Members(nn.Module, ABC):
    """A network, or several, or one with random parts, answering for all members at once."""

    count: int
    """T, the number of members."""
    sampling: str = "fixed"
    """`fixed`, `seeded` or `random`."""
    head: str | None = None
    """The classifier's module, the same in every network; what enters it are the features."""
    found: Mapping[str, object] = MappingProxyType({})
    """What `Method.fit` chose or found on the way; plain values."""
    layouts: tuple[str, ...] = ("fold",)
    """How a graph may hold the members, the way that `forward` does it first: `fold`, in the batch axis of one network;
    `unroll`, each as its own branch."""

    @property
    def fidelity(self) -> Fidelity | None:
        """How well fixed members stand for many, of what was found; None where that was not measured."""
        known = cast(Mapping[str, Any] | None, self.found.get("fidelity"))
        return None if known is None else Fidelity(**known)

    @property
    def not_compared(self) -> str | None:
        """Why fixed members were not compared with many more; None where they were, or where none are drawn."""
        return cast(str | None, self.found.get("not_compared"))

    @property
    @abstractmethod
    def networks(self) -> tuple[nn.Module, ...]:
        """The networks that the members share, G of them."""

    @abstractmethod
    def forward(self, images: Tensor, seed: Tensor | None = None) -> Tensor:
        """Images (N, C, H, W) to logits (T, N, K) float32; `seed` (N,) int64 where the sampling is seeded."""

    def with_features(self, images: Tensor, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (T, N, K) and, of each network, what enters its classifier (G, N, D), float32, in one pass.

        Members that share a network and differ before its classifier give the mean of their features.

        Raises:
            UncertaintyError: the classifier is not known.
        """
        if self.head is None:
            raise UncertaintyError("the model's classifier was not found: scores of features cannot be used")
        with head_inputs() as kept:
            logits = self(images, seed)
        return logits, torch.stack([self._of_images(vectors, logits) for vectors in kept])

    def _of_images(self, vectors: Tensor, logits: Tensor) -> Tensor:
        """(N, D) from what entered one network's classifier."""
        return vectors

    def draw(self, images: Tensor, seed: Tensor | None = None) -> tuple[Tensor, ...]:
        """What tells members apart, for `branch`: of each site masks (T, N, ...), or (T, 1, ...) alike for all images.

        Raises:
            UncertaintyError: members that do not share one network.
        """
        raise UncertaintyError("these members do not share one network that could be run for one of them alone")

    def branch(self, images: Tensor, masks: Sequence[Tensor]) -> Tensor:
        """Images (N, C, H, W) to one member's logits (N, K) float32; of each site its masks, (N, ...) or (1, ...).

        Raises:
            UncertaintyError: as for `draw`.
        """
        raise UncertaintyError("these members do not share one network that could be run for one of them alone")

    def structure(self) -> dict[str, Any]:
        """What `Method.restore` needs besides the networks and the tensors; plain values."""
        return {"members": self.count, "head": self.head, "found": dict(self.found)}

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

    def __init__(self, network: nn.Module, head: str | None = None) -> None:
        super().__init__()
        self.network, self.head = bare_copy(network).eval().requires_grad_(False), head
        if head is not None:
            tap_head(self.network, head)

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The one."""
        return (self.network,)

    def forward(self, images: Tensor, seed: Tensor | None = None) -> Tensor:
        """Images (N, C, H, W) to logits (1, N, K) float32."""
        return as_logits(self.network(images)).float().unsqueeze(0)


class Networks(Members):
    """Several networks, each a member."""

    layouts = ("unroll",)

    def __init__(
        self, networks: Sequence[nn.Module], head: str | None = None, found: Mapping[str, object] | None = None
    ) -> None:
        super().__init__()
        self.count, self.head, self.found = len(networks), head, dict(found or {})
        self.several = nn.ModuleList(bare_copy(network).eval().requires_grad_(False) for network in networks)
        if head is not None:
            for network in self.several:
                tap_head(network, head)

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """All of them."""
        return tuple(self.several)

    def forward(self, images: Tensor, seed: Tensor | None = None) -> Tensor:
        """Images (N, C, H, W) to logits (T, N, K) float32."""
        return torch.stack([as_logits(network(images)).float() for network in self.several])
