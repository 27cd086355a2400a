"""Choosing among the combinations of a study by what they score on held-out data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress_uq.study.file import Choice, Study
from compress_uq.study.kinds import KINDS
from compress_uq.study.runs import Run
from compress_uq.study.statistics import Group, Summary, grouped

__all__ = ["Chosen", "choose"]


@dataclass(frozen=True)
class Chosen:
    """What the choice came to."""

    group: Group | None
    """The chosen combination; None where no one keeps the bound."""
    rule: str
    held_out: Summary | None
    """The measure on held-out data, of the chosen combination or else of the one that comes nearest."""
    test: Mapping[str, Summary | None]
    """Figures of the chosen combination on test, which had no part in the choice."""
    left_out: int = 0
    """Combinations that are not done, or have no figure on held-out data."""

    def text(self) -> str:
        """The choice in one line."""
        aside = f" ({self.left_out} combinations left out: not done, or no held-out figure)" if self.left_out else ""
        if self.group is None:
            nearest = "" if self.held_out is None else f"; the nearest has {self.held_out.text()}"
            return f"no combination has {self.rule} on held-out data{nearest}{aside}"
        assert self.held_out is not None
        return f"{self.group.label()}: {self.held_out.text()} on held-out data, by the rule: {self.rule}{aside}"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "rule": self.rule,
            "left_out": self.left_out,
            "settings": None if self.group is None else dict(self.group.values),
            "held_out": None if self.held_out is None else vars(self.held_out),
            "test": {name: None if summary is None else vars(summary) for name, summary in self.test.items()},
        }


def choose(study: Study, runs: Sequence[Run]) -> Chosen | None:
    """The preferred combination among those whose runs are all done; None where the study asks for no choice."""
    choice = study.choice
    if choice is None:
        return None
    kind = KINDS[study.kind]
    counted = [run for run in runs if run.meets(choice.where)]
    groups = grouped(counted, study.varied)
    candidates = [group for group in groups if all(run.done for run in group.runs)]
    measure = kind.held_out(choice.measure) or choice.measure
    found = [(group, group.summary(measure)) for group in candidates]
    scored = [(group, held) for group, held in found if held is not None and held.count == len(group.runs)]
    prefer = choice.prefer or choice.measure
    higher = kind.higher_is_better(prefer)
    rule = _rule(choice, higher)
    kept = [
        (preference, group, held)
        for group, held in scored
        if _keeps(choice, held.mean) and (preference := _preference(group, prefer, study)) is not None
    ]
    if not kept:
        sign = -1 if choice.at_least is not None else 1
        nearest = min((held for _, held in scored), key=lambda held: sign * held.mean, default=None)
        return Chosen(None, rule, nearest, {}, len(groups) - len(scored))
    best = max if higher else min
    _, group, held = best(kept, key=lambda candidate: candidate[0])
    names = dict.fromkeys((choice.measure, *kind.shown))
    return Chosen(group, rule, held, {name: group.summary(name) for name in names}, len(groups) - len(scored))


def _keeps(choice: Choice, value: float) -> bool:
    return (choice.at_most is None or value <= choice.at_most) and (choice.at_least is None or value >= choice.at_least)


def _preference(group: Group, prefer: str, study: Study) -> float | None:
    """An axis counts by its value, a measure by its mean on held-out data."""
    if prefer in study.axes:
        return float(group.values[prefer])
    kind = KINDS[study.kind]
    found = group.summary(kind.held_out(prefer) or prefer)
    return None if found is None else found.mean


def _rule(choice: Choice, higher: bool) -> str:
    """`ece at most 0.02, the highest sparsity`."""
    bound = f" at most {choice.at_most:g}" if choice.at_most is not None else ""
    bound = f" at least {choice.at_least:g}" if choice.at_least is not None else bound
    preferred = f"the {'highest' if higher else 'lowest'} {choice.prefer or choice.measure}"
    return f"{choice.measure}{bound}, {preferred}" if bound else preferred
