"""What a model loses without some of its channels, for many choices of them in one pass.

The choices are a mapped dimension of `torch.func.vmap`: what comes before the first layer that reads a group's channels
is computed once for all of them, streams that no choice touches stay shared, and a reader that is a sum over its inputs
is not computed again: it loses the contribution of the channels that go.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress_uq.data import check_labels
from compress_uq.models import as_logits
from compress_uq.pruning.criteria.hiding import Hiding
from compress_uq.pruning.graph.groups import Group

__all__ = ["Ablation", "Answers"]

_ELEMENTS = 2**21
"""Numbers in the largest activation of one pass: a few megabytes, which a cache holds."""
_FEWEST_IMAGES, _MOST_IMAGES = 8, 1024


@dataclass(frozen=True)
class Answers:
    """What the images say of K choices of channels that go."""

    loss: Tensor
    """(K,) float64: mean cross-entropy, nats."""
    accuracy: Tensor
    """(K,) float64."""
    class_accuracy: Tensor
    """(K, classes) float64; NaN for a class without images. An image with two highest logits is not recognised."""


class Ablation:
    """A model in eval mode, and images that tell what it loses without some channels.

    Args:
        model: on the images' device; it is not changed.
        groups: its groups; channels are numbered as in them.
        images: (N, C, H, W).
        labels: (N,).

    Raises:
        DataError: a label that the model has no class for.
        PruningError: a layer reads channels in a way that does not let them be hidden.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], images: Tensor, labels: Tensor) -> None:
        self._model, self._images, self._labels = model, images, labels
        order, self._classes = _calls(model, images[:1])
        check_labels(labels, self._classes)
        called = [module for module, _ in order]
        self._groups = [Hiding(group, set(called), images.device) for group in groups]
        self._mapped = [group.mappable for group in self._groups]
        self._widths = []
        for group in self._groups:
            first = next((place for place, module in enumerate(called) if module in group.modules), 0)
            self._widths.append(max(1, *(size for _, size in order[first:])))

    def base(self, removed: Sequence[Sequence[int]]) -> Answers:
        """The model without the channels that are gone already, `removed` for each group; K = 1."""
        size = max(_FEWEST_IMAGES, min(_MOST_IMAGES, _ELEMENTS // max(self._widths)))
        tally = _Tally(1, self._labels, self._classes)
        with torch.no_grad(), self._hidden(removed):
            for start in range(0, len(self._images), size):
                logits = as_logits(self._model(self._images[start : start + size]))
                tally.add(slice(0, 1), start, logits.unsqueeze(0))
        return tally.answers()

    def without(self, place: int, choices: Tensor, removed: Sequence[Sequence[int]]) -> Answers:
        """The model without each of K choices of channels of one group, one at a time.

        Args:
            place: the group's.
            choices: (K, M) channels, none of which is gone.
            removed: channels of each group that are gone in all of them.
        """
        others = [[] if i == place else channels for i, channels in enumerate(removed)]
        width, tally = self._widths[place], _Tally(len(choices), self._labels, self._classes)
        choices = choices.to(self._images.device)
        images = max(_FEWEST_IMAGES, min(_MOST_IMAGES, _ELEMENTS // (len(choices) * width)))
        chunk = max(1, _ELEMENTS // (images * width))
        with torch.no_grad(), _plain_attention(), self._hidden(others):
            for start in range(0, len(self._images), images):
                batch = self._images[start : start + images]
                for first in range(0, len(choices), chunk):
                    logits = self._logits(place, choices[first : first + chunk], removed[place], batch)
                    tally.add(slice(first, first + len(logits)), start, logits)
        return tally.answers()

    def _logits(self, place: int, choices: Tensor, removed: Sequence[int], images: Tensor) -> Tensor:
        """(K, N, classes)."""
        gone = self._tensor(removed)

        def one(choice: Tensor) -> Tensor:
            with self._groups[place].hide(gone, choice):
                return as_logits(self._model(images))

        if self._mapped[place]:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
                    return torch.func.vmap(one)(choices)
            except RuntimeError:
                # Some operator of this model cannot be mapped: its choices are taken one by one.
                self._mapped[place] = False
        return torch.stack([one(choice) for choice in choices])

    @contextmanager
    def _hidden(self, removed: Sequence[Sequence[int]]) -> Iterator[None]:
        """Inside the block channels are gone from each group."""
        with ExitStack() as stack:
            for group, channels in zip(self._groups, removed, strict=True):
                if channels:
                    stack.enter_context(group.hide(self._tensor(channels)))
            yield

    def _tensor(self, channels: Sequence[int]) -> Tensor:
        return torch.tensor(list(channels), dtype=torch.long, device=self._images.device)


class _Tally:
    """Losses and hits of K choices, batch by batch."""

    def __init__(self, choices: int, labels: Tensor, classes: int) -> None:
        self._labels = labels
        self._members = F.one_hot(labels, classes).double()
        self._loss = torch.zeros(choices, dtype=torch.float64, device=labels.device)
        self._hits = torch.zeros(choices, classes, dtype=torch.float64, device=labels.device)

    def add(self, choices: slice, start: int, logits: Tensor) -> None:
        """Logits (K, N, classes) of the images from `start` on."""
        images = slice(start, start + logits.shape[1])
        labels = self._labels[images].expand(len(logits), 1, -1)
        # Classes ahead of images: what is summed over is then far apart in memory, which vectorises.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).transpose(1, 2)
        log_probabilities = logits.contiguous().log_softmax(1)
        right = log_probabilities.gather(1, labels)[:, 0]
        self._loss[choices] -= right.double().sum(1)
        rivals = log_probabilities.scatter_(1, labels, -torch.inf).amax(1)
        self._hits[choices] += (right > rivals).double() @ self._members[images]

    def answers(self) -> Answers:
        count = len(self._labels)
        found = self._loss / count, self._hits.sum(1) / count, self._hits / self._members.sum(0)
        return Answers(*(part.cpu() for part in found))


def _calls(model: nn.Module, image: Tensor) -> tuple[list[tuple[nn.Module, int]], int]:
    """Modules in the order in which they answer, with the size of each answer for one image; and the classes."""
    order: list[tuple[nn.Module, int]] = []

    def note(module: nn.Module, _inputs: object, output: object) -> None:
        order.append((module, output.numel() if isinstance(output, Tensor) else 0))

    with ExitStack() as stack, torch.no_grad():
        for module in model.modules():
            stack.callback(module.register_forward_hook(note).remove)
        classes = as_logits(model(image)).shape[1]
    return order, classes


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention takes its plain path, which can be mapped."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
