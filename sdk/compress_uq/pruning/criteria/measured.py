"""What the criteria share that look at training images: one pass for all layers, and gradients beside the model's."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from compress_uq.cost import evaluation_mode
from compress_uq.data import check_labels
from compress_uq.errors import PruningError
from compress_uq.models import as_logits
from compress_uq.predict import default_batch_size
from compress_uq.progress import Progress
from compress_uq.pruning.criteria.criterion import Criterion, Evidence, check_reduction, reduce_layers
from compress_uq.pruning.graph.groups import CoupledLayer, Group

__all__ = ["Gradients", "Measured", "filter_sums"]

_TRANSPOSED = nn.modules.conv._ConvTransposeNd
_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)


@dataclass(frozen=True)
class Measured(Criterion):
    """Scores the outputs of all weighted layers in one pass over training images, then reduces each group's layers."""

    reduction: str = "mean"
    """As for `PerLayer`."""
    images: int = 640
    """How many training images are looked at: five batches of 128, as in the HRank authors' code."""
    normalised: ClassVar[bool] = False
    """As for `PerLayer`: a change of the loss compares layers as it is."""

    def __post_init__(self) -> None:
        check_reduction(self.reduction)
        if self.images < 1:
            raise PruningError(f"criterion {self.name!r} with images={self.images}: expected 1 or more")

    @abstractmethod
    def measure(self, layers: Mapping[str, nn.Module], evidence: Evidence) -> Mapping[str, Tensor]:
        """Importance (out_channels,) of the outputs of each named layer; a layer that has none may be left out."""

    def scores(self, groups: Sequence[Group], evidence: Evidence) -> list[Tensor]:
        """(channels,) float64 for each group.

        Raises:
            DataError: no training split, or labels that the model has no class for.
            PruningError: a layer that its score cannot be measured for.
        """
        scored = [{i: layer for i, layer in enumerate(group.layers) if _has_filters(layer)} for group in groups]
        layers = {layer.name: layer.module for places in scored for layer in places.values()}
        with evaluation_mode(evidence.model):
            measured = self.measure(layers, evidence)
        return [
            reduce_layers(
                group,
                {i: measured[layer.name] for i, layer in places.items() if layer.name in measured},
                self.reduction,
                self.name,
                normalised=self.normalised,
            )
            for group, places in zip(groups, scored, strict=True)
        ]

    def batches(self, evidence: Evidence) -> Iterator[tuple[Tensor, Tensor]]:
        """The images and labels, in batches as large as in training, or smaller where images are large."""
        size = min(evidence.training.batch_size, default_batch_size(evidence.example.shape[1:]))
        steps = -(-self.images // size)
        for step, batch in enumerate(evidence.images(self.name, self.images, size)):
            yield batch
            evidence.progress(Progress(f"pruning by {self.name}", step + 1, steps))


class Gradients:
    """Derivatives by layers' weights, for a model whose own gradients and flags stay.

    Differentiated are stand-ins of the weights, so that frozen weights have gradients too.
    """

    def __init__(self, criterion: str, layers: Mapping[str, nn.Module], evidence: Evidence) -> None:
        self._criterion, self._model, self._names = criterion, evidence.model, list(layers)
        self.weights = [layer.get_parameter("weight").detach().requires_grad_() for layer in layers.values()]

    def logits(self, images: Tensor, labels: Tensor) -> Tensor:
        """Logits (N, K) of a batch, whose labels are checked."""
        stand_ins = {f"{name}.weight": weight for name, weight in zip(self._names, self.weights, strict=True)}
        with torch.enable_grad():
            logits = as_logits(functional_call(self._model, stand_ins, (images,)))
        check_labels(labels, logits.shape[1])
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy of a batch."""
        with torch.enable_grad():
            return F.cross_entropy(self.logits(images, labels), labels)

    def of(self, value: Tensor, *, retain_graph: bool = False) -> list[Tensor]:
        """The gradient of a scalar by every weight.

        Raises:
            PruningError: a weight that the scalar does not depend on, by the layer's name.
        """
        if not value.requires_grad:
            raise PruningError(self._unreached(self._names[0]))
        found = torch.autograd.grad(value, self.weights, retain_graph=retain_graph, allow_unused=True)
        for name, gradient in zip(self._names, found, strict=True):
            if gradient is None:
                raise PruningError(self._unreached(name))
        return list(found)

    def _unreached(self, name: str) -> str:
        return (
            f"criterion {self._criterion!r} needs the gradient of the logits by the weight of {name}, and there is "
            "none: forward() cuts it off (detach, no_grad) or leaves the layer out; take another criterion, or keep it"
        )


def filter_sums(layer: nn.Module, values: Tensor) -> Tensor:
    """(out_channels,) float64: sums of values, shaped as the layer's weight, over each output's filter."""
    values = values.detach().double()
    if isinstance(layer, _TRANSPOSED):
        # (in, out / groups, ...): the inputs of one group of channels lie together.
        parts = values.flatten(2).sum(2).view(layer.groups, -1, values.shape[1])
        return parts.sum(1).flatten()
    return values.flatten(1).sum(1)


def _has_filters(layer: CoupledLayer) -> bool:
    return layer.side == "out" and isinstance(layer.module, _WEIGHTED)
