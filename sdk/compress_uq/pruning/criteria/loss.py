"""How much worse the model gets on training images without a channel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import ClassVar

import torch
from torch import Tensor

from compress_uq.cost import evaluation_mode
from compress_uq.errors import PruningError, UnknownNameError
from compress_uq.predict import default_batch_size
from compress_uq.progress import Progress, ProgressCallback
from compress_uq.pruning.criteria.criterion import Criterion, Evidence
from compress_uq.pruning.criteria.leave_one_out import Ablation, Answers
from compress_uq.pruning.graph.groups import Group

__all__ = ["Loss", "importance_classes"]

_AHEAD = 16
"""Steps that a sweep looks at in one pass; those behind the first that is taken are looked at again."""

Step = tuple[int, tuple[int, ...]]
"""A group's place, and units of it that go together."""


@dataclass(frozen=True)
class Loss(Criterion):
    """What the removal of a channel adds to the loss on training images (Charpentier 2020, sections 3.2 to 3.5).

    A channel is important where that is more than `tolerance`, worse where it is less than minus that, else zero. With
    no counts, channels that are not important go, one at least stays in each group, and every mode but `precomputed`
    compares with the lowest loss seen, so that no more than `tolerance` is lost in all. With counts, removal goes on
    until they are reached, and what the mode leaves to be removed are the least important channels at that point.
    """

    mode: str = "precomputed"
    """When importance is computed: `precomputed` (once), `exhaustive` (for all channels after each removal, the best
    removal is made), `greedy` (channel by channel: the first that is not important goes, in sweeps until none is), or
    `random` (her Algorithm 2: random steps of `step` channels, kept where the loss is no worse)."""
    measure: str = "loss"
    """`loss`, or `worst-class-accuracy`: the loss of accuracy of the class with the lowest, ties broken by the loss."""
    images: int = 512
    """How many training images are looked at."""
    tolerance: float = 1e-3
    """Change that counts as none, as a share of the whole model's loss (of the error rate of its worst class)."""
    ignore: float = 0.1
    """Greedy mode: a channel that adds more than this share is important for good, and not looked at again."""
    step: int = 1
    """Channels removed at a time, in the modes `exhaustive` and `random`."""
    name: ClassVar[str] = "loss"
    sizes_itself: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for option, given, known in (("mode", self.mode, _MODES), ("measure", self.measure, _MEASURES)):
            if given not in known:
                raise UnknownNameError(f"{option} of criterion 'loss'", given, known)
        for option, value, least in (("images", self.images, 1), ("step", self.step, 1)):
            if value < least:
                raise PruningError(f"criterion 'loss' with {option}={value}: expected {least} or more")
        if not 0 <= self.tolerance <= self.ignore:
            raise PruningError(
                f"criterion 'loss' with tolerance={self.tolerance} and ignore={self.ignore}: expected 0 <= tolerance "
                "<= ignore"
            )

    def scores(self, groups: Sequence[Group], evidence: Evidence) -> list[Tensor]:
        """(channels,) float64 for each group: the change, nats, when the channel alone is removed from the whole model.

        Channels that a grouped convolution binds together go together and have one score.

        Raises:
            DataError: no training split, or a label that the model has no class for.
            PruningError: a layer that channels cannot be hidden from.
        """
        with evaluation_mode(evidence.model):
            search = _Search(self, groups, evidence, [group.channels for group in groups])
            return [
                values.new_empty(group.channels).index_copy(
                    0, units.flatten(), (values - search.base).repeat_interleave(units.shape[1])
                )
                for group, units, values in zip(groups, search.units, search.singles(), strict=True)
            ]

    def choose(self, groups: Sequence[Group], evidence: Evidence, counts: Sequence[int] | None) -> list[list[int]]:
        """The channels that go, sorted, for each group; without counts, those that the model can do without.

        Raises:
            DataError, PruningError: as `scores`.
        """
        if counts is not None and self.mode == "precomputed":
            return super().choose(groups, evidence, counts)
        with evaluation_mode(evidence.model):
            search = _Search(self, groups, evidence, counts)
            _MODES[self.mode](search)
            if counts is not None:
                search.fill()
        return search.removed()


def importance_classes(changes: Tensor, limit: float) -> dict[str, int]:
    """How many channels are important, zero and worse, for changes (channels,) of the loss and what counts as none."""
    return {
        "important": int((changes > limit).sum()),
        "zero": int((changes.abs() <= limit).sum()),
        "worse": int((changes < -limit).sum()),
    }


class _Search:
    """What has gone, what it cost, and what more would cost; in units: channels that only go together."""

    def __init__(self, rule: Loss, groups: Sequence[Group], evidence: Evidence, counts: Sequence[int] | None) -> None:
        self.rule, self.sizes_itself = rule, counts is None
        self.units = [_units(group) for group in groups]
        width = [units.shape[1] for units in self.units]
        self.room = [
            len(units) - 1 if counts is None else counts[place] // width[place]
            for place, units in enumerate(self.units)
        ]
        self.generator = torch.Generator().manual_seed(evidence.seed)
        size = default_batch_size(evidence.example.shape[1:])
        images, labels = zip(*evidence.images(rule.name, rule.images, size), strict=True)
        self._ablation = Ablation(evidence.model, groups, torch.cat(images), torch.cat(labels))
        self._progress: ProgressCallback = evidence.progress
        self._gone: list[list[int]] = [[] for _ in groups]
        self.base = self.best = float(_MEASURES[rule.measure](self._ablation.base(self._gone)))

    def removed(self) -> list[list[int]]:
        """The channels that are gone, sorted, for each group."""
        return [sorted(units[gone].flatten().tolist()) for units, gone in zip(self.units, self._gone, strict=True)]

    def left(self, place: int) -> list[int]:
        """Units of a group that are there; none where no more of them may go."""
        gone = set(self._gone[place])
        return [unit for unit in range(len(self.units[place])) if unit not in gone] if self.room[place] else []

    def values(self, place: int, choices: Sequence[Sequence[int]]) -> Tensor:
        """(K,) the measure, lower is better, without each of K choices of as many units of a group."""
        channels = self.units[place][torch.tensor(choices)].flatten(1)
        return _MEASURES[self.rule.measure](self._ablation.without(place, channels, self.removed()))

    def singles(self) -> list[Tensor]:
        """The measure without each unit that may go, for each group."""
        found = []
        for place in range(len(self.units)):
            left = self.left(place)
            found.append(self.values(place, [[unit] for unit in left]) if left else torch.zeros(0))
            self.tell(place + 1, len(self.units))
        return found

    def acceptable(self, value: float) -> bool:
        """Not important: no worse than the best so far, or as good as that."""
        return value <= self.best + self.rule.tolerance * self.base

    def take(self, steps: Sequence[Step]) -> None:
        """Remove units."""
        for place, units in steps:
            self._gone[place] += units
            self.room[place] -= len(units)
        self.best = min(self.best, self.value())

    def value(self, steps: Sequence[Step] = ()) -> float:
        """The measure as things are, or without these units too."""
        gone = self.removed()
        for place, units in steps:
            gone[place] += self.units[place][list(units)].flatten().tolist()
        return float(_MEASURES[self.rule.measure](self._ablation.base(gone)))

    def fill(self) -> None:
        """Remove the least important units until no more are to go."""
        if any(self.room):
            for place, values in enumerate(self.singles()):
                left, room = self.left(place), self.room[place]
                self._gone[place] += [left[i] for i in values.argsort(stable=True)[:room].tolist()]
                self.room[place] = 0

    def tell(self, step: int, steps: int) -> None:
        """Report progress."""
        self._progress(Progress(f"pruning by {self.rule.name}", step, steps))


def _precomputed(search: _Search) -> None:
    for place, values in enumerate(search.singles()):
        order = values.argsort(stable=True)[: search.room[place]].tolist()
        going = tuple(unit for unit in order if values[unit] <= search.base * (1 + search.rule.tolerance))
        if going:
            search.take([(place, going)])


def _exhaustive(search: _Search) -> None:
    while True:
        found = [
            (value, place, unit)
            for place, values in enumerate(search.singles())
            for unit, value in zip(search.left(place), values.tolist(), strict=True)
            if not search.sizes_itself or search.acceptable(value)
        ]
        steps: list[Step] = [(place, (unit,)) for _, place, unit in sorted(found)[: search.rule.step]]
        steps = [s for i, s in enumerate(steps) if sum(t[0] == s[0] for t in steps[:i]) < search.room[s[0]]]
        if not steps:
            return
        if search.sizes_itself and len(steps) > 1 and not search.acceptable(search.value(steps)):
            steps = steps[:1]
        search.take(steps)


def _greedy(search: _Search) -> None:
    waiting: list[Step] = [(place, (unit,)) for place in range(len(search.units)) for unit in search.left(place)]
    taken = True
    while taken:
        taken, refused = _sweep(search, waiting)
        bound = search.best + search.rule.ignore * search.base
        waiting = [step for step, value in refused if value <= bound]


def _random(search: _Search) -> None:
    steps: list[Step] = []
    for place, units in enumerate(search.units):
        order = torch.randperm(len(units), generator=search.generator).split(search.rule.step)
        steps += [(place, tuple(part.tolist())) for part in order]
    _sweep(search, [steps[i] for i in torch.randperm(len(steps), generator=search.generator).tolist()])


def _sweep(search: _Search, waiting: Sequence[Step]) -> tuple[bool, list[tuple[Step, float]]]:
    """Try steps in their order; those that are acceptable are taken, the others are given back with their values."""
    taken, done, refused = False, 0, list[tuple[Step, float]]()
    while done < len(waiting):
        place, units = waiting[done]
        if len(units) > search.room[place]:
            done += 1
            continue
        ahead = waiting[done : done + _AHEAD]
        alike = list(takewhile(lambda s: s[0] == place and len(s[1]) == len(units), ahead))  # noqa: B023
        values = search.values(place, [step[1] for step in alike]).tolist()
        first = next((i for i, value in enumerate(values) if search.acceptable(value)), len(alike))
        refused += list(zip(alike[:first], values[:first], strict=True))
        if first < len(alike):
            search.take([alike[first]])
            taken = True
        done += min(first + 1, len(alike))
        search.tell(done, len(waiting))
    return taken, refused


def _units(group: Group) -> Tensor:
    """(units, parts) channels that go together: one each, or the same place in each part of a grouped convolution."""
    return torch.arange(group.channels).view(group.divisions, -1).T.contiguous()


def _mean_loss(answers: Answers) -> Tensor:
    return answers.loss


def _worst_class(answers: Answers) -> Tensor:
    """Error rate of the worst class; the loss, brought below 1, weighs less than any two rates can differ by."""
    worst = answers.class_accuracy.nan_to_num(nan=1.0).amin(1)
    return 1 - worst + 1e-10 * answers.loss / (1 + answers.loss)


_MODES: dict[str, Callable[[_Search], None]] = {
    "precomputed": _precomputed,
    "exhaustive": _exhaustive,
    "greedy": _greedy,
    "random": _random,
}
_MEASURES: dict[str, Callable[[Answers], Tensor]] = {"loss": _mean_loss, "worst-class-accuracy": _worst_class}
