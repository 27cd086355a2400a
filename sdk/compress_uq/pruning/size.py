"""What was asked for: how many channels go, and of which groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from compress_uq.cost import Cost
from compress_uq.errors import PruningError, UnknownNameError
from compress_uq.pruning.amounts import (
    Amount,
    Target,
    check_amount,
    matches,
    parse_sparsity,
    removal_order,
    sparsity_counts,
)
from compress_uq.pruning.criteria import Criterion, Evidence
from compress_uq.pruning.graph import Group
from compress_uq.pruning.record import Record
from compress_uq.pruning.schedules import Schedule
from compress_uq.pruning.targets import TargetReached, meet_target

__all__ = ["Size"]


@dataclass(frozen=True)
class Size:
    """What was asked for: how many channels go, of which groups."""

    sparsity: Amount | None
    target: Target | None
    scope: str
    round_to: int
    keep: tuple[str, ...]

    @classmethod
    def of(
        cls,
        sparsity: Amount | str | None,
        target: str | Target | None,
        scope: str,
        round_to: int,
        keep: tuple[str, ...],
        rule: Criterion,
    ) -> Size:
        """From the arguments of `prune`.

        Raises:
            PruningError: two sizes, none where the criterion needs one, or a scope that does not go with them.
        """
        amount = parse_sparsity(sparsity) if isinstance(sparsity, str) else sparsity
        goal = Target.parse(target) if isinstance(target, str) else target
        if goal is not None and not isinstance(goal, Target):
            raise PruningError(f"target={goal!r}: expected a text such as macs=0.5, or a Target")
        if amount is not None:
            check_amount(amount)
        if amount is not None and goal is not None:
            raise PruningError(f"sparsity={amount} and target={goal} were given: expected one of the two")
        if amount is None and goal is None and not rule.sizes_itself:
            raise PruningError(
                f"criterion {rule.name!r} does not decide how much goes: pass --sparsity 0.6, --target macs=0.5, or "
                "another size"
            )
        if scope not in ("layer", "global"):
            raise UnknownNameError("scope", scope, ("layer", "global"))
        if scope == "global" and amount is None and goal is None:
            raise PruningError(f"criterion {rule.name!r} decides the size of each layer: scope global needs a sparsity")
        if scope == "global" and isinstance(amount, Mapping):
            raise PruningError("scope global takes one sparsity, not one for each layer")
        if scope == "global" and rule.trains:
            raise PruningError(f"criterion {rule.name!r} has no scores before its training: it takes scope layer only")
        if not isinstance(round_to, int) or round_to < 1:
            raise PruningError(f"round_to={round_to}: expected a whole number, 1 or more")
        return cls(amount, goal, scope, round_to, keep)

    def prunable(self, groups: list[Group]) -> list[Group]:
        """The groups that may lose channels."""
        if not groups:
            raise PruningError(
                "nothing can be pruned: no layer but the classifier has channels to lose, or all of them are frozen"
            )
        for pattern in self.keep:
            if not any(matches(group, pattern) for group in groups):
                names = ", ".join(group.name for group in groups)
                raise PruningError(f"keep {pattern!r}: no prunable layer matches; they are {names}")
        left = [group for group in groups if not any(matches(group, pattern) for pattern in self.keep)]
        if not left:
            raise PruningError(f"nothing can be pruned: keep={list(self.keep)} matches every prunable layer")
        return left

    def counts(
        self, model: nn.Module, example: Tensor, groups: list[Group], rule: Criterion, evidence: Evidence, before: Cost
    ) -> tuple[dict[str, int] | None, TargetReached | None]:
        """Channels to remove by group; None where the criterion decides."""
        reached = None
        if self.sparsity is None and self.target is None:
            return None, None
        if self.target is None and self.scope == "layer":
            assert self.sparsity is not None
            found = sparsity_counts(groups, self.sparsity, self.round_to)
        else:
            scores = rule.scores(groups, evidence) if self.scope == "global" else None
            order = removal_order(groups, scores, self.round_to)
            if self.target is None:
                assert isinstance(self.sparsity, float | int)
                found = order.share(self.sparsity)
            else:
                found, reached = meet_target(self.target, model, example, order, before)
        return {group.name: count for group, count in zip(groups, found, strict=True)}, reached

    def settings(self, rule: Criterion, plan: Schedule) -> dict[str, object]:
        """What was asked for, in plain values."""
        return {
            "sparsity": dict(self.sparsity) if isinstance(self.sparsity, Mapping) else self.sparsity,
            "target": None if self.target is None else str(self.target),
            "criterion": {"name": rule.name, **_plain_options(rule)},
            "scope": self.scope,
            "round_to": self.round_to,
            "keep": list(self.keep),
            "schedule": {"name": plan.name, **_plain_options(plan)},
        }

    def nothing(self, record: Record) -> str:
        """Why nothing was pruned, and what to do."""
        widest = max(record.widths.values())
        if self.sparsity is None and self.target is None:
            return "nothing was pruned: no removal improves the loss; give a sparsity or a target to prune all the same"
        given = f"target {self.target}" if self.sparsity is None else f"sparsity {self.sparsity}"
        return (
            f"nothing was pruned: {given} with round_to {self.round_to} keeps every channel of layers up to "
            f"{widest} wide; raise --sparsity or pass --round-to 1"
        )


def _plain_options(plugin: Any) -> dict[str, object]:
    values = {field.name: getattr(plugin, field.name) for field in fields(plugin)}
    return {name: value for name, value in values.items() if isinstance(value, bool | int | float | str | tuple)}
