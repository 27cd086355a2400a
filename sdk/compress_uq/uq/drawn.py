"""Methods whose members are networks with weights drawn from a distribution, batch norm estimated anew for each."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compress_uq.batch_norm import BatchNorm, batch_norms, estimate_statistics
from compress_uq.cost import on_device
from compress_uq.data import batches
from compress_uq.errors import InputError, UncertaintyError
from compress_uq.stages import Origin
from compress_uq.training import resolve_device
from compress_uq.uq.base import Method, Trained, check_samples, describe_networks
from compress_uq.uq.hooks import bare_copy
from compress_uq.uq.members import Members, Networks

__all__ = [
    "DiagonalGaussian",
    "DrawnWeights",
    "WeightDistribution",
    "draw_networks",
    "flat_weights",
    "require_observed",
    "tracked_weights",
    "with_weights",
]

BATCH = 128


class WeightDistribution(Protocol):
    """A distribution over all weights of a network but batch norm's, as vectors (P,) float32 on the CPU."""

    @property
    def mean(self) -> Tensor:
        """(P,)."""

    def draw(self, generator: torch.Generator) -> Tensor:
        """One sample (P,)."""


@dataclass(frozen=True)
class DiagonalGaussian:
    """Independent weights."""

    mean: Tensor
    """(P,)."""
    variance: Tensor
    """(P,)."""

    def draw(self, generator: torch.Generator) -> Tensor:
        """One sample (P,)."""
        return self.mean + self.variance.sqrt() * torch.randn(self.mean.shape, generator=generator)


def tracked_weights(network: nn.Module) -> list[nn.Parameter]:
    """All parameters but batch norm's, in the order of the network."""
    of_norms = {id(p) for m in network.modules() if isinstance(m, BatchNorm) for p in m.parameters()}
    return [p for p in network.parameters() if id(p) not in of_norms]


def flat_weights(network: nn.Module) -> Tensor:
    """The tracked weights (P,) float32, on their device."""
    return torch.cat([p.detach().flatten().float() for p in tracked_weights(network)])


def with_weights(network: nn.Module, weights: Tensor) -> nn.Module:
    """A copy without hooks, in eval, whose tracked weights are those of a vector (P,)."""
    other = bare_copy(network).eval()
    tensors = tracked_weights(other)
    parts = weights.split([p.numel() for p in tensors])
    with torch.no_grad():
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))
    return other


def draw_networks(
    network: nn.Module,
    weights: WeightDistribution,
    samples: int,
    *,
    seed: int,
    trained: Trained,
    norm_batches: int,
) -> list[nn.Module]:
    """`samples` networks with drawn weights, or the one of the mean, each with statistics of `norm_batches` batches.

    All networks see the same training images. Without training images batch norm stays as it is.
    """
    generator = torch.Generator().manual_seed(seed)
    vectors = [weights.mean] if samples == 1 else [weights.draw(generator) for _ in range(samples)]
    networks = [with_weights(network, vector) for vector in vectors]
    if trained.train is not None and norm_batches:
        for member in networks:
            _renormalise(member, trained, norm_batches, seed)
    return networks


def _renormalise(network: nn.Module, trained: Trained, count: int, seed: int) -> None:
    layers = list(batch_norms(network).values())
    if not layers:
        return
    device = resolve_device(trained.device)
    with on_device(network, device):
        estimate_statistics(network, layers, _some_images(trained, count, seed, device))


def _some_images(trained: Trained, count: int, seed: int, device: torch.device) -> Iterator[Tensor]:
    """The first `count` full batches of training images in an order that the seed fixes; one short one at the least."""
    assert trained.train is not None
    order = torch.Generator().manual_seed(seed)
    full = len(trained.train) >= BATCH  # type: ignore[arg-type]
    stream = batches(trained.train, BATCH, shuffle=order, drop_last=full)
    for done, (images, _) in enumerate(stream):
        if done == count:
            return
        yield images.to(device)


@dataclass(frozen=True)
class DrawnWeights(Method):
    """What such methods share: how many members are drawn, and from what their batch norm is estimated.

    One sample is the mean of the distribution. `norm_batches` batches of 128 training images give each member's
    statistics, 0 leaves the network's own; `seed` draws.
    """

    samples: int = 10
    norm_batches: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        check_samples(self.samples)
        if self.norm_batches < 0:
            raise InputError(f"norm_batches={self.norm_batches}: expected 0 or more")

    def prepare(self, model: nn.Module, origin: Origin) -> nn.Module:
        """A plain copy."""
        return copy.deepcopy(model)

    @abstractmethod
    def distribution(self, network: nn.Module, trained: Trained) -> tuple[WeightDistribution, dict[str, object]]:
        """The weights' distribution, and what was chosen or found on the way, in plain values.

        Raises:
            UncertaintyError: a stage was missed.
        """

    def fit(self, trained: Trained) -> Members:
        """Networks with drawn weights.

        Raises:
            UncertaintyError: several models, or a stage that was missed.
        """
        network = trained.one(self.name)
        weights, found = self.distribution(network, trained)
        networks = draw_networks(
            network, weights, self.samples, seed=self.seed, trained=trained, norm_batches=self.norm_batches
        )
        return Networks(networks, trained.head(), found)

    def restore(self, networks: Sequence[nn.Module], structure: Mapping[str, Any]) -> Members:
        """The networks."""
        return Networks(networks, structure.get("head"), structure.get("found"))

    def describe(self, model: nn.Module, origin: Origin) -> dict[str, object]:
        """Members and cost; what training costs more is added by each method."""
        return describe_networks(self, self.samples, model, origin)


def require_observed(method: str, trained: Trained, *names: str) -> dict[str, Tensor]:
    """What the method's observer held, by name.

    Raises:
        UncertaintyError: nothing was observed, or something else, or the network has batch norm and no images are
            given to estimate it from.
    """
    observed = trained.observed
    if observed is None or any(name not in observed for name in names):
        raise UncertaintyError(
            f"{method} is made of what it saw while the model was trained: call finetune(..., method={method!r}) with "
            "epochs of 1 or more, and pass its result on"
        )
    network = trained.one(method)
    weights = sum(p.numel() for p in tracked_weights(network))
    if len(observed["mean"]) != weights:
        raise UncertaintyError(
            f"{method} watched {len(observed['mean'])} weights and the model has {weights}: pass the result of "
            "finetune as it is, and prune before it"
        )
    if batch_norms(network):
        trained.images(f"{method}'s batch norm, which is estimated for every member,")
    return {name: observed[name].cpu() for name in names}
