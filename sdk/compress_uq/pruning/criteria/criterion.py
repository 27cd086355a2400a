"""What every criterion is: importance of channels, or a choice of those that go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from compress_uq.config import TrainingConfig
from compress_uq.data import Augmentation, Splits, batches
from compress_uq.errors import PruningError, UnknownNameError
from compress_uq.progress import ProgressCallback, silent
from compress_uq.pruning.graph.groups import CoupledLayer, Group
from compress_uq.training import AfterBackward, Epoch, fit_network

__all__ = [
    "Criterion", "Evidence", "OwnCriterion", "PerLayer", "check_reduction", "least_important", "perturbed",
    "reduce_layers",
]  # fmt: skip


@dataclass(frozen=True)
class Evidence:
    """What a criterion may look at besides the groups, and how it may train."""

    model: nn.Module
    """The copy that is pruned, whole and in eval mode; the groups' modules are its own."""
    example: Tensor
    """(1, C, H, W), on the model's device."""
    splits: Splits | None = None
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Criteria that train spend all its epochs; data-driven ones take batch size and workers from it."""
    augment: str | Augmentation = "auto"
    teacher: nn.Module | None = None
    seed: int = 0
    progress: ProgressCallback = silent
    checkpoint: Path | None = None
    """File that a training resumes from and writes after every epoch."""
    history: list[Epoch] = field(default_factory=list)
    """Every epoch that was trained on the way, added as it is done."""
    perturbation: float = 0.0
    """Noise on the scores that rank channels, in standard deviations of a group's scores."""

    def images(self, criterion: str, count: int, batch_size: int = 128) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of training images (N, C, H, W) and labels (N,): `count` images of a random order fixed by the seed.

        Raises:
            DataError: no training split.
        """
        generator = torch.Generator().manual_seed(self.seed)
        seen = 0
        for images, labels in batches(
            self._train(criterion), batch_size, shuffle=generator, workers=self.training.workers, drop_last=False
        ):
            take = min(len(images), count - seen)
            yield images[:take].to(self.example), labels[:take].to(self.example.device)
            seen += take
            if seen >= count:
                return

    def train(self, criterion: str, after_backward: AfterBackward | None = None) -> None:
        """Train the model in place, as fine-tuning does, with a hand on the gradients of each step; eval mode after it.

        Raises:
            DataError: no training split.
            PruningError: no epochs to train for.
        """
        if self.training.epochs == 0:
            raise PruningError(f"criterion {criterion!r} prunes while it trains, for 0 epochs: give it 1 or more")
        train = self._train(criterion)
        assert self.splits is not None
        epochs = fit_network(
            self.model,
            train,
            self.training,
            augment=self.splits.info.augment if self.augment == "auto" else self.augment,
            teacher=self.teacher,
            progress=self.progress,
            stage=f"pruning by {criterion}",
            checkpoint=self.checkpoint,
            after_backward=after_backward,
        )
        self.history.extend(epochs)

    def _train(self, criterion: str):  # type: ignore[no-untyped-def]
        if self.splits is None:
            raise PruningError(f"criterion {criterion!r} looks at training images: pass splits= with a train split")
        return self.splits.require("train", f"criterion {criterion!r}")


class Criterion(ABC):
    """A rule for which channels go; a frozen dataclass whose fields are its options."""

    name: ClassVar[str]
    sizes_itself: ClassVar[bool] = False
    """It can decide how many channels go, when neither sparsity nor target does."""

    @property
    def trains(self) -> bool:
        """Whether it changes the weights while it chooses, so that it needs epochs and a train split."""
        return False

    @property
    def training_share(self) -> float:
        """Of a run's epochs, what choosing takes where it trains; the rest is the fine-tuning of what is left."""
        return 0.6

    @abstractmethod
    def scores(self, groups: Sequence[Group], evidence: Evidence) -> list[Tensor]:
        """Importance (channels,) float64 of each group's channels; the lowest go."""

    def choose(self, groups: Sequence[Group], evidence: Evidence, counts: Sequence[int] | None) -> list[list[int]]:
        """The channels that go, sorted, for each group; `counts` of them where it is given.

        Raises:
            PruningError: no counts, and the criterion cannot decide them; scores that cannot rank.
        """
        if counts is None:
            raise PruningError(
                f"criterion {self.name!r} does not decide how many channels go: give a sparsity or target"
            )
        chosen = []
        scores = perturbed(self.scores(groups, evidence), evidence)
        for group, score, count in zip(groups, scores, counts, strict=True):
            chosen.append(least_important(self.name, group, score, count))
        return chosen


@dataclass(frozen=True)
class OwnCriterion(Criterion):
    """A caller's function from a group to the importance (channels,) of its channels."""

    function: Callable[[Group], Tensor]
    name: ClassVar[str] = "own"

    def scores(self, groups: Sequence[Group], evidence: Evidence) -> list[Tensor]:
        """The function's."""
        return [torch.as_tensor(self.function(group)) for group in groups]


@dataclass(frozen=True)
class PerLayer(Criterion):
    """Scores each weighted layer's output channels alone, and reduces the layers of a group to one score."""

    reduction: str = "mean"
    """`mean`, `sum` or `max` over the group's layers; `first`: the layer that names the group alone."""
    normalised: ClassVar[bool] = True
    """Each layer is divided by its mean; False where the score itself makes layers comparable."""

    def __post_init__(self) -> None:
        check_reduction(self.reduction)

    @abstractmethod
    def layer_scores(self, layer: CoupledLayer, evidence: Evidence) -> Tensor | None:
        """Importance (out_channels,) of a layer's outputs; None where the layer has no say."""

    def scores(self, groups: Sequence[Group], evidence: Evidence) -> list[Tensor]:
        """The layers' scores, reduced."""
        return [
            reduce_layers(
                group,
                {
                    i: score
                    for i, layer in enumerate(group.layers)
                    if layer.side == "out" and (score := self.layer_scores(layer, evidence)) is not None
                },
                self.reduction,
                self.name,
                normalised=self.normalised,
            )
            for group in groups
        ]


def perturbed(scores: Sequence[Tensor], evidence: Evidence) -> list[Tensor]:
    """Scores (channels,) of each group with Gaussian noise of the evidence's strength, drawn from its seed."""
    if evidence.perturbation == 0:
        return list(scores)
    generator = torch.Generator().manual_seed(evidence.seed)
    noise = [torch.randn(score.shape, generator=generator, dtype=torch.float64).to(score) for score in scores]
    return [s + evidence.perturbation * s.std(unbiased=False) * n for s, n in zip(scores, noise, strict=True)]


def check_reduction(reduction: str) -> None:
    """See that a reduction is known.

    Raises:
        UnknownNameError: it is not; names the nearest.
    """
    if reduction not in _REDUCTIONS:
        raise UnknownNameError("reduction", reduction, _REDUCTIONS)


def reduce_layers(
    group: Group, scores: dict[int, Tensor], reduction: str, criterion: str, *, normalised: bool = True
) -> Tensor:
    """One importance (channels,) float64 from the scores of a group's layers, given by their place in `group.layers`.

    Where it is `normalised`, each layer is divided by its mean first, so that a wide layer counts no more than a narrow
    one, in its group and in a global order; the positions that a layer has for one channel are added up.

    Raises:
        PruningError: no layer has a score, or the reduction is unknown.
    """
    check_reduction(reduction)
    if not scores:
        raise PruningError(f"criterion {criterion!r} finds nothing to rank in {group.name}: no layer that it scores")
    rows = []
    for place, score in scores.items():
        layer = group.layers[place]
        share = score.detach().double().cpu()[layer.indices]
        total = torch.zeros(group.channels, dtype=torch.float64).index_add_(0, layer.channels, share)
        rows.append(total / share.mean().abs().clamp_min(1e-30) if normalised else total)
    return _REDUCTIONS[reduction](torch.stack(rows))


def least_important(criterion: str, group: Group, scores: Tensor, count: int) -> list[int]:
    """The `count` lowest scores' channels, sorted; each part of a grouped convolution loses the same places.

    Raises:
        PruningError: scores of the wrong shape, not finite, or all equal, which is no order at all.
    """
    if scores.shape != (group.channels,):
        raise PruningError(
            f"criterion {criterion!r} gave scores {tuple(scores.shape)} for {group.name}: expected ({group.channels},)"
        )
    if not torch.isfinite(scores).all():
        raise PruningError(f"criterion {criterion!r} gave scores that are not finite for {group.name}")
    if count == 0:
        return []
    if group.channels > 1 and bool((scores == scores[0]).all()):
        raise PruningError(
            f"criterion {criterion!r} gives all {group.channels} channels of {group.name} the score "
            f"{float(scores[0]):g}: it cannot choose; take another criterion, or keep this layer"
        )
    if group.divisions == 1:
        return sorted(scores.argsort(stable=True)[:count].tolist())
    places = scores.view(group.divisions, -1).mean(0).argsort(stable=True)[: count // group.divisions]
    offsets = torch.arange(group.divisions) * (group.channels // group.divisions)
    return sorted((places.unsqueeze(0) + offsets.unsqueeze(1)).flatten().tolist())


_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda rows: rows.mean(0),
    "sum": lambda rows: rows.sum(0),
    "max": lambda rows: rows.amax(0),
    "first": lambda rows: rows[0],
}
