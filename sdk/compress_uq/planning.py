"""What a run will do, found out before anything is trained, and whatever its stages would refuse."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Unpack, cast

import torch
from torch import nn

from compress_uq.calibration import check_labels
from compress_uq.choosing import check_members
from compress_uq.config import AnswerConfig, TrainingConfig
from compress_uq.cost import on_device
from compress_uq.data import Augmentation, Splits, identical_images, labels_of, set_aside
from compress_uq.errors import InputError, ModelError
from compress_uq.finishing import AnswerOptions, check_answers
from compress_uq.models import as_logits, refuse_non_finite
from compress_uq.progress import ProgressCallback, silent
from compress_uq.pruning import PruneResult, PruningOptions, pruning_share, resolve_criterion
from compress_uq.search import Budget, SearchResult, search_sparsity
from compress_uq.shrinking import check_method, prune_networks
from compress_uq.stages import ModelsOrResults, unpack_all
from compress_uq.steps import TrainingOptions, resolve_method, training_config
from compress_uq.structure import differing_tensor
from compress_uq.uq import Method

__all__ = ["CompressOptions", "CompressionPlan", "plan_compression"]


class CompressOptions(PruningOptions, TrainingOptions, AnswerOptions, total=False):
    """What `compress` hands on to `prune`, to `finetune` and to the last steps."""


@dataclass(frozen=True)
class CompressionPlan:
    """What a run will do, found out before anything is trained."""

    networks: tuple[PruneResult, ...]
    """The pruned model, or each of an ensemble's; where pruning itself trains, stand-ins of the same size."""
    pruning: PruningOptions
    pruning_share: float | None
    """Of the epochs, the share that is spent while channels go, the rest being fine-tuning; None where pruning does not
    train."""
    method: Method
    uncertainty: Mapping[str, object]
    """What the method will do to this model, and the cost of a prediction."""
    answers: AnswerConfig
    training: TrainingConfig
    augment: str | Augmentation
    calibration_images: str
    """Which images the calibrator sees."""
    warnings: tuple[str, ...]
    search: SearchResult | None = None
    """How the size was found, where a budget decides it."""

    @property
    def pruned(self) -> PruneResult:
        """The pruned model, of an ensemble the first member."""
        return self.networks[0]


def plan_compression(
    model: ModelsOrResults,
    splits: Splits,
    *,
    uq: str | Method = "mc-dropout",
    training: TrainingConfig | None = None,
    budget: Sequence[str | Budget] = (),
    progress: ProgressCallback = silent,
    **options: Unpack[CompressOptions],
) -> CompressionPlan:
    """Prune, place the uncertainty method, and check the inputs: all of `compress` that needs no training.

    With a budget the search for the size, which trains a little, is part of it.

    Raises:
        InputError: whatever the stages would refuse.
    """
    pruning, tuning, answers = _sort(options)
    config, augment = training_config(training, tuning)
    models, origin = unpack_all(model)
    method = resolve_method(uq).of_models(len(models))
    splits.require("test", "the report card")
    check_answers(answers, splits)
    splits = set_aside(splits, rules=answers.rules)
    for number, dense in enumerate(models, 1):
        refuse_non_finite(dense, "the model" if len(models) == 1 else f"model {number}")
        _refuse_unlike(models[0], dense, number)
    share = pruning_share(pruning)
    if share is not None and config.epochs == 0:
        raise InputError("epochs=0: criterion or schedule train while they prune; give them epochs, or take others")
    check_method(method, models[0], origin, splits, pruning=pruning, training=config)
    search = None
    if budget:
        # What chooses the size and what certifies the result do not look at the same images.
        search = search_sparsity(
            model, replace(splits, decision=None) if answers.rules else splits, budget, pruning=pruning, method=method,
            calibration=answers.calibration, training=config, augment=augment, progress=progress,
        )  # fmt: skip
        pruning = {**pruning, "sparsity": search.sparsity}
    # Where pruning trains, another criterion and a single step give the same sizes at once.
    outline: PruningOptions = pruning if share is None else {**pruning, **_outline(pruning)}
    networks = prune_networks(models, splits, pruning=outline, method=method, training=config, progress=progress)
    described = method.describe(networks[0].model, networks[0].origin)
    if len(networks) > 1:
        macs, size = (sum(getattr(n.after, name) for n in networks) for name in ("macs", "size_bytes"))
        described |= {"macs": macs, "share_of_dense_pass": macs / networks[0].before.macs, "stored_bytes": size}
    check_members(answers.score, answers.ood_score, cast(int, described["samples"]))
    if splits.calibration is not None:
        labels = labels_of(splits.calibration).numpy()
        check_labels(answers.calibration, labels, _classes(networks[0], splits))
    warnings = list(splits.info.notes)
    functional = described.get("functional_dropout")
    if functional:
        names = ", ".join(str(name) for name in functional) if isinstance(functional, list) else str(functional)
        warnings.append(f"dropout called as a function in {names} is not a site: only dropout modules are sampled")
    for pair, count in identical_images(splits).items():
        warnings.append(f"{count} identical images are in both parts of {pair}")
    return CompressionPlan(
        networks, pruning, share, method, described, answers, config, augment, splits.info.calibration,
        tuple(warnings), search,
    )  # fmt: skip


def _sort(options: CompressOptions) -> tuple[PruningOptions, TrainingOptions, AnswerConfig]:
    """What is for `prune`, what is for training, and what is for the last steps."""
    pruning = {name: value for name, value in options.items() if name in PruningOptions.__annotations__}
    answers = {name: value for name, value in options.items() if name in AnswerOptions.__annotations__}
    tuning = {name: value for name, value in options.items() if name not in {**pruning, **answers}}
    return cast(PruningOptions, pruning), cast(TrainingOptions, tuning), AnswerConfig(**cast(AnswerOptions, answers))


def _outline(pruning: PruningOptions) -> PruningOptions:
    trains = resolve_criterion(pruning.get("criterion", "l1")).trains
    return {"schedule": "one-shot", "criterion": "l1"} if trains else {"schedule": "one-shot"}


def _classes(pruned: PruneResult, splits: Splits) -> int:
    """How many classes the model tells apart."""
    network = copy.deepcopy(pruned.model).eval()
    with on_device(network, "cpu"), torch.inference_mode():
        return as_logits(network(splits.example())).shape[1]


def _refuse_unlike(first: nn.Module, other: nn.Module, number: int) -> None:
    """A bundle rebuilds all members from one architecture."""
    differing = differing_tensor(first, other)
    if differing is not None:
        name, one, two = differing
        raise ModelError(
            f"model {number} is of another architecture than the first: {name} is {one} in the first and {two} in it; "
            "the models of a list are of one architecture"
        )
