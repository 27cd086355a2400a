"""Structured pruning: channels are taken out, and the model is smaller."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypedDict

from torch import Tensor, nn

from compress_uq.config import TrainingConfig
from compress_uq.cost import Cost, measure_cost
from compress_uq.data import Augmentation, Splits
from compress_uq.errors import ModelError, PruningError
from compress_uq.models import as_logits
from compress_uq.progress import ProgressCallback, silent
from compress_uq.pruning.amounts import Amount, Target
from compress_uq.pruning.batch_norm import recalibrate_batch_norm
from compress_uq.pruning.criteria.by_name import resolve_criterion
from compress_uq.pruning.criteria.criterion import Criterion, Evidence
from compress_uq.pruning.graph.groups import Group, dependency_groups
from compress_uq.pruning.graph.refusals import naming_what_breaks, refuse_unprunable
from compress_uq.pruning.record import PrunedLayer, Record
from compress_uq.pruning.rewind import Rewinder
from compress_uq.pruning.schedules import SCHEDULES, Schedule
from compress_uq.pruning.size import Size
from compress_uq.pruning.targets import TargetReached
from compress_uq.stages import ModelOrResult, Origin, unpack
from compress_uq.training import Epoch, resolve_device

__all__ = ["PruneResult", "PrunedLayer", "PruningOptions", "check_pruning", "prunable_layers", "prune", "pruning_share"]


class PruningOptions(TypedDict, total=False):
    """What is removed, how, and when; the arguments of `prune` that a caller of `compress` may give by name."""

    sparsity: Amount | str | None
    target: str | Target | None
    criterion: str | Criterion | Callable[[Group], Tensor]
    scope: str
    round_to: int
    keep: Sequence[str]
    schedule: str | Schedule
    initial: nn.Module | None


@dataclass(frozen=True)
class PruneResult:
    """A pruned copy and what it cost before and after."""

    model: nn.Module
    before: Cost
    after: Cost
    layers: tuple[PrunedLayer, ...]
    origin: Origin
    target: TargetReached | None = None
    history: tuple[Epoch, ...] = ()
    """Of the training that was part of the pruning."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """What was asked for, in plain values."""

    @property
    def sparsity(self) -> float:
        """Share of the prunable channels that are gone."""
        total = sum(layer.before for layer in self.layers)
        return 1 - sum(layer.after for layer in self.layers) / total


def prune(
    model: ModelOrResult,
    example_inputs: Tensor | None = None,
    *,
    sparsity: Amount | str | None = None,
    target: str | Target | None = None,
    criterion: str | Criterion | Callable[[Group], Tensor] = "l1",
    scope: str = "layer",
    round_to: int = 8,
    keep: Sequence[str] = (),
    schedule: str | Schedule = "one-shot",
    initial: nn.Module | None = None,
    splits: Splits | None = None,
    training: TrainingConfig | None = None,
    augment: str | Augmentation = "auto",
    teacher: nn.Module | None = None,
    recalibrate: bool = True,
    perturbation: float = 0.0,
    seed: int = 0,
    progress: ProgressCallback = silent,
    work_dir: Path | None = None,
) -> PruneResult:
    """Remove the least important channels of a copy; the classifier's outputs stay.

    Args:
        model: a classifier, or a stage's result.
        example_inputs: images (N, C, H, W) of the right shape; an earlier stage's result knows it.
        sparsity: s, above 0 and below 1: the share of channels removed from each layer, or a share for each pattern of
            layer names. One of sparsity and target, or neither where the criterion decides (`loss`).
        target: what may be kept of the dense model's cost: `macs=0.5`, `params=0.4` or `latency=0.5`.
        criterion: a name of `compress-uq methods`, a configured criterion, or a function from a group to the
            importance (channels,) of its channels.
        scope: `layer` removes the same share everywhere; `global` the lowest scores of the whole network, at most 0.9
            of a layer.
        round_to: channels kept are a multiple of this; 1 keeps exactly C - int(C s).
        keep: names, patterns or types of layers whose outputs all stay.
        schedule: `one-shot`, `iterative`, `lottery`, or a configured schedule.
        initial: the model before it was trained, for a schedule that rewinds.
        splits: needs `train` where criterion or schedule look at images; with it, batch norm is recalibrated.
        training: how to train, where criterion or schedule do; all its epochs are spent here.
        augment: for that training; by default what suits the data.
        teacher: distils in that training.
        recalibrate: estimate batch norm's statistics anew after the removal, from training images.
        perturbation: Gaussian noise on the scores, in standard deviations of a group's scores, so that other seeds
            remove other channels; sizes are settled without it. Criteria without scores (`loss`, `resrep`) take none.
        seed: of everything random.
        progress: called as the work goes on.
        work_dir: a folder where training keeps its state.

    Raises:
        PruningError: a size that cannot be, a model that cannot be traced, or nothing that can be pruned.
        ModelError: the model's output is not logits.
        DataError: training images are needed and there are none.
    """
    rule, plan = resolve_criterion(criterion), _schedule(schedule)
    asked = Size.of(sparsity, target, scope, round_to, tuple([keep] if isinstance(keep, str) else keep), rule)
    if rule.trains and plan.name != "one-shot":
        raise PruningError(f"criterion {rule.name!r} prunes while it trains: it takes the one-shot schedule only")
    given, origin = unpack(model, example_inputs)
    example = origin.example(given, "prune")
    refuse_unprunable(given)
    pruned = copy.deepcopy(given)
    device = example.device if training is None else resolve_device(training.device)
    home, example = example.device, example.to(device)
    pruned.to(device)
    flags = {name: p.requires_grad for name, p in pruned.named_parameters()}
    modes = {name: module.training for name, module in pruned.named_modules()}
    pruned.eval()
    before = _first_cost(pruned, example)
    evidence = Evidence(
        pruned, example, splits, training or TrainingConfig(), augment, teacher, seed, progress,
        None if work_dir is None else work_dir / "pruning-0.pt", perturbation=perturbation,
    )  # fmt: skip
    rewinder = _rewinder(plan, given, initial, evidence)

    record, reached = _remove_in_steps(pruned, rule, plan, asked, evidence, before, rewinder, flags)
    if not record.anything:
        raise PruningError(asked.nothing(record))
    with naming_what_breaks(pruned):
        if recalibrate and splits is not None and splits.train is not None:
            recalibrate_batch_norm(pruned, evidence, modes)
        after = measure_cost(pruned, example.shape[1:])
    for name, module in pruned.named_modules():
        module.training = modes[name]
    origin = Origin(
        **{**vars(origin), "input_shape": tuple(example.shape[1:]), "dense_cost": origin.dense_cost or before}
    )
    if reached is not None:
        reached = reached.measured(before, after)
    return PruneResult(
        pruned.to(home),
        before,
        after,
        record.layers(),
        origin,
        reached,
        tuple(evidence.history),
        asked.settings(rule, plan),
    )


def prunable_layers(model: nn.Module, example: Tensor, *, keep: Sequence[str] = ()) -> dict[str, int]:
    """Channels of every group that may lose some, by the name of the layer that stands for it; the model is unchanged.

    Raises:
        PruningError: the model cannot be traced, or nothing can be pruned.
    """
    copied = copy.deepcopy(model).eval()
    first = next(copied.parameters())
    groups = dependency_groups(copied, example.to(first))
    return {group.name: group.channels for group in Size(None, None, "layer", 1, tuple(keep)).prunable(groups)}


def check_pruning(options: PruningOptions) -> None:
    """See, without a model, that the options can be and go together.

    Raises:
        PruningError: they cannot, or do not.
    """
    rule = resolve_criterion(options.get("criterion", "l1"))
    _schedule(options.get("schedule", "one-shot"))
    keep = options.get("keep", ())
    Size.of(
        options.get("sparsity"), options.get("target"), options.get("scope", "layer"), options.get("round_to", 8),
        (keep,) if isinstance(keep, str) else tuple(keep), rule,
    )  # fmt: skip


def pruning_share(options: PruningOptions) -> float | None:
    """Of a run's epochs, the share that criterion or schedule spend while channels go; None where neither trains."""
    rule = resolve_criterion(options.get("criterion", "l1"))
    plan = _schedule(options.get("schedule", "one-shot"))
    if rule.trains:
        return rule.training_share
    return plan.share if plan.trains else None


def _remove_in_steps(
    pruned: nn.Module,
    rule: Criterion,
    plan: Schedule,
    asked: Size,
    evidence: Evidence,
    before: Cost,
    rewinder: Rewinder | None,
    flags: Mapping[str, bool],
) -> tuple[Record, TargetReached | None]:
    """Remove channels in place, training and rewinding as the schedule says; sizes are settled at the first step."""
    record: Record | None = None
    reached: TargetReached | None = None
    final: dict[str, int] | None = None
    for number, step in enumerate(plan.steps(evidence.training.epochs if plan.share else 0)):
        groups = asked.prunable(dependency_groups(pruned, evidence.example))
        step_rule = rule if step.criterion is None else resolve_criterion(step.criterion)
        if record is None:
            record = Record.of(groups)
            final, reached = asked.counts(pruned, evidence.example, groups, step_rule, evidence, before)
        counts = None if final is None else record.due(groups, final, step.fraction)
        chosen = step_rule.choose(groups, evidence, counts)
        for group, channels in zip(groups, chosen, strict=True):
            record.take(group.name, channels)
            if channels:
                group.remove(channels)
        _restore(pruned, flags)
        if rewinder is not None and step.rewind:
            rewinder.rewind(pruned, record.removed)
        if step.epochs:
            training = replace(evidence.training, epochs=step.epochs)
            checkpoint = evidence.checkpoint and evidence.checkpoint.with_name(f"pruning-{number + 1}.pt")
            replace(evidence, training=training, checkpoint=checkpoint).train("iterative pruning")
    assert record is not None
    return record, reached


def _restore(model: nn.Module, flags: Mapping[str, bool]) -> None:
    """Removal makes new parameters: their flags are those of the old, and no gradient is kept."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name])
        parameter.grad = None


def _rewinder(plan: Schedule, trained: nn.Module, initial: nn.Module | None, evidence: Evidence) -> Rewinder | None:
    if plan.rewinds_to is None:
        return None
    return Rewinder.to(plan.rewinds_to, plan.early_epochs, trained, initial, evidence)


def _schedule(schedule: str | Schedule) -> Schedule:
    if isinstance(schedule, str):
        return SCHEDULES[schedule]()
    if not isinstance(schedule, Schedule):
        raise PruningError(
            f"schedule={schedule!r}: expected a name ({', '.join(SCHEDULES.names)}) or a configured schedule, "
            "such as Iterative(count=3)"
        )
    return schedule


def _first_cost(model: nn.Module, example: Tensor) -> Cost:
    """The cost of a model that may not run at all, its failure told in one line."""
    answers: list[object] = []
    handle = model.register_forward_hook(lambda _module, _inputs, output: answers.append(output))
    try:
        cost = measure_cost(model, example.shape[1:])
        as_logits(answers[-1])
    except ModelError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"the model does not run on images of shape {tuple(example.shape[1:])}: {reason}") from error
    finally:
        handle.remove()
    return cost
