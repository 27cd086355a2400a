"""The whole product, top to bottom.

model + splits -> prune -> fine-tune -> fit uncertainty -> calibrate -> choose scores -> decide
-> evaluate -> export -> report card -> bundle
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Unpack, cast

import numpy as np
from torch import nn

from compress_uq._version import __version__
from compress_uq.bundle import Bundle, recipe_hash
from compress_uq.calibration import Identity
from compress_uq.compression import Compressed, Compression
from compress_uq.config import AnswerConfig, TrainingConfig
from compress_uq.data import ImageDataset, Splits, identical_images, set_aside
from compress_uq.errors import DataError, GateError, InputError, ModelError
from compress_uq.export import export_onnx
from compress_uq.finishing import AnswerOptions, check_answers
from compress_uq.metrics import random_ause
from compress_uq.models import Architecture, refuse_non_finite
from compress_uq.predict import collect
from compress_uq.progress import ProgressCallback, silent
from compress_uq.pruning import PruneResult, PruningOptions, pruning_share, resolve_criterion
from compress_uq.report import Evaluation, ReportCard, broken, class_changes, evaluate, lost_classes, onnx_milliseconds
from compress_uq.search import Budget, SearchResult, search_sparsity
from compress_uq.shrinking import Shrunk, prune_networks
from compress_uq.stages import ModelsOrResults, Origin, unpack_all
from compress_uq.steps import TrainingOptions, resolve_method, training_config
from compress_uq.uncertain import UncertainModel
from compress_uq.uq import Method

__all__ = ["CompressionPlan", "compress", "plan_compression", "suspicions"]


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
    models, _ = unpack_all(model)
    method = resolve_method(uq).of_models(len(models))
    splits.require("test", "the report card")
    check_answers(answers, splits)
    splits = set_aside(splits, rules=answers.rules)
    for number, dense in enumerate(models, 1):
        refuse_non_finite(dense, "the model" if len(models) == 1 else f"model {number}")
        _refuse_unlike(models[0], dense, number)
    search = None
    if budget:
        # What chooses the size and what certifies the result do not look at the same images.
        search = search_sparsity(
            model, replace(splits, decision=None) if answers.rules else splits, budget, pruning=pruning, method=method,
            calibration=answers.calibration, training=config, augment=augment, progress=progress,
        )  # fmt: skip
        pruning = {**pruning, "sparsity": search.sparsity}
    share = pruning_share(pruning)
    if share is not None and config.epochs == 0:
        raise InputError("epochs=0: criterion or schedule train while they prune; give them epochs, or take others")
    if method.watches and config.epochs <= (0 if share is None else 1):
        raise InputError(
            f"epochs={config.epochs}: {method.name} is made of what it sees in fine-tuning, and no epoch is left for it"
        )
    # Where pruning trains, another criterion and a single step give the same sizes at once.
    outline: PruningOptions = pruning if share is None else {**pruning, **_outline(pruning)}
    networks = prune_networks(models, splits, pruning=outline, method=method, training=config, progress=progress)
    described = method.describe(networks[0].model, networks[0].origin)
    if len(networks) > 1:
        macs, size = (sum(getattr(n.after, name) for n in networks) for name in ("macs", "size_bytes"))
        described |= {"macs": macs, "share_of_dense_pass": macs / networks[0].before.macs, "stored_bytes": size}
    warnings = list(splits.info.notes)
    functional = described.get("functional_dropout")
    if functional:
        names = ", ".join(str(name) for name in functional) if isinstance(functional, list) else str(functional)
        warnings.append(f"dropout called as a function in {names} is not a site: only dropout modules are sampled")
    for pair, count in identical_images(splits).items():
        warnings.append(f"{count} identical images are in both parts of {pair}")
    return CompressionPlan(
        networks, pruning, share, method, described, answers, splits.info.calibration, tuple(warnings), search
    )


def compress(
    model: ModelsOrResults,
    splits: Splits,
    *,
    uq: str | Method = "mc-dropout",
    training: TrainingConfig | None = None,
    budget: Sequence[str | Budget] = (),
    arch: str | Architecture | None = None,
    control: bool = False,
    plan: CompressionPlan | None = None,
    progress: ProgressCallback = silent,
    work_dir: Path | None = None,
    **options: Unpack[CompressOptions],
) -> Bundle:
    """Prune a trained classifier, fine-tune it, and bundle it with calibrated uncertainty and a report card.

    Args:
        model: the trained classifier, or several of one architecture, each of which becomes a member of an `ensemble`;
            they are not changed. An ensemble of one model is made by pruning and fine-tuning it several times.
        splits: needs `train` (unless `epochs=0`), `calibration` (unless calibration is `none`) and `test`; a decision
            split is set aside of calibration where there is none and a rule is asked for.
        uq: uncertainty method, a name or configured, such as `MCDropout(p=0.1, samples=20)`.
        training: how to fine-tune. A criterion or schedule that trains takes its share of these epochs.
        budget: in place of a size: what the model may lose, such as `accuracy_drop<=0.01`; see `search_sparsity`.
        arch: what builds the dense model, so that a bundle can be rebuilt anywhere.
        control: also fine-tune the dense model in the same way, so that pruning's own effect shows.
        plan: what `plan_compression` made of the same arguments, so that it is not made again.
        progress: called as the work goes on.
        work_dir: a folder where training keeps its state, to resume from after an interruption.
        options: what is removed, as `prune` takes it (`sparsity` or `target`, `criterion`, `scope`, `round_to`, `keep`,
            `schedule`, `initial`), and fields of `TrainingConfig` and of `AnswerConfig` (`calibration`, `score`,
            `ood_score`, `risk`, `coverage`, `risk_delta`, `sets`) by name.

    Raises:
        InputError: whatever is wrong with the inputs, before anything is trained where it can be told.
    """
    _, tuning, _ = _sort(options)
    config, augment = training_config(training, tuning)
    models, _ = unpack_all(model)
    if plan is None:
        plan = plan_compression(
            model, splits, uq=uq, training=training, budget=budget, progress=progress, **options
        )  # fmt: skip
    splits = set_aside(splits, rules=plan.answers.rules)
    architecture = _architecture(arch, splits, plan.pruned.origin)
    if architecture is not None:
        _refuse_misfit(architecture, models[0])
    run = Compression(
        models, plan.pruned.origin, splits, plan.pruning, plan.method, plan.answers, config, augment, progress,
        work_dir, list(plan.warnings),
    )  # fmt: skip
    with _modes_kept(models):
        # The dense model as it was given.
        dense = run.dense()
        dense_evaluation = run.measured(dense, "dense")
        run.warnings += _near_chance(dense_evaluation)

        # The compressed model, and the dense one calibrated as it is.
        compressed = run.compressed(plan.networks)
        dense_calibrated_evaluation = run.measured(run.dense_calibrated(compressed), "dense calibrated")
        recipe = {
            **_recipe(plan, compressed, config, splits, architecture),
            "calibrator": compressed.model.calibrator.name,
            "calibration_choice": compressed.model.calibrator.choice,
        }
        evaluation = _with_cost(run.measured(compressed.model, "compressed"), training_seconds=compressed.seconds)
        uncalibrated = run.uncalibrated(compressed)

        # Its exported file, measured again, and timed beside one dense pass.
        with tempfile.TemporaryDirectory() as folder:
            files = {"onnx": Path(folder) / "model.onnx", "dense": Path(folder) / "dense.onnx"}
            as_torch = compressed.model.members.layouts[0]  # not by timing: the same run gives the same file
            export_onnx(compressed.model, files["onnx"], layout=as_torch, recipe_hash=recipe_hash(recipe))
            onnx_evaluation = evaluate(files["onnx"], splits, device=config.device, progress=progress, stage="onnx")
            run.warnings += _export_dense(dense, files)
            shape = compressed.model.origin.input_shape
            assert shape is not None
            latency = onnx_milliseconds({k: f for k, f in files.items() if f.is_file()}, shape)
            content = files["onnx"].read_bytes()

        # The dense model given the same fine-tuning and uncertainty, if it was asked for.
        control_evaluation = None
        if control:
            control_model, seconds = run.control(compressed)
            control_evaluation = _with_cost(run.measured(control_model, "control"), training_seconds=seconds)

    run.warnings += suspicions(compressed.model, splits, evaluation)
    run.warnings += lost_classes(class_changes(dense_evaluation, evaluation))
    run.warnings += broken(evaluation.decisions, compressed.model.record)
    card = ReportCard(
        dense=_with_cost(dense_evaluation, latency=latency.get("dense")),
        dense_calibrated=_with_cost(dense_calibrated_evaluation, latency=latency.get("dense")),
        compressed=_with_cost(evaluation, latency=latency["onnx"]),
        onnx=_with_cost(onnx_evaluation, latency=latency["onnx"]),
        control=control_evaluation,
        recipe=recipe,
        warnings=tuple(dict.fromkeys(run.warnings)),
        fidelity=_fidelity(compressed.model),
        uncalibrated=uncalibrated,
    )
    return Bundle.build(compressed.model, models[0], card, content, architecture, splits.info.fingerprint)


@contextmanager
def _modes_kept(models: Sequence[nn.Module]) -> Iterator[None]:
    """Every module's mode is the caller's again after the block."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _sort(options: CompressOptions) -> tuple[PruningOptions, TrainingOptions, AnswerConfig]:
    """What is for `prune`, what is for training, and what is for the last steps."""
    pruning = {name: value for name, value in options.items() if name in PruningOptions.__annotations__}
    answers = {name: value for name, value in options.items() if name in AnswerOptions.__annotations__}
    tuning = {name: value for name, value in options.items() if name not in {**pruning, **answers}}
    return cast(PruningOptions, pruning), cast(TrainingOptions, tuning), AnswerConfig(**cast(AnswerOptions, answers))


def _outline(pruning: PruningOptions) -> PruningOptions:
    trains = resolve_criterion(pruning.get("criterion", "l1")).trains
    return {"schedule": "one-shot", "criterion": "l1"} if trains else {"schedule": "one-shot"}


def _recipe(
    plan: CompressionPlan,
    compressed: Compressed,
    config: TrainingConfig,
    splits: Splits,
    architecture: Architecture | None,
) -> dict[str, Any]:
    """All that a run can be repeated from; plain values."""
    info, networks, uncertain = splits.info, compressed.networks, compressed.model
    pruned = networks[0].pruned
    resolved = info.augment if config.augment == "auto" else config.augment
    sizes = {p: len(s) for p in ("train", "calibration", "decision", "test") if (s := getattr(splits, p)) is not None}
    recipe = {
        "version": __version__,
        "architecture": None if architecture is None else architecture.to_json(),
        "data": {
            "name": Path(info.name).name,
            "images": sizes,
            "calibration": info.calibration,
            "mean": info.mean,
            "std": info.std,
            "ood": {name: len(dataset) for name, dataset in splits.ood.items()},  # type: ignore[arg-type]
            "validation_ood": {name: len(dataset) for name, dataset in splits.validation_ood.items()},  # type: ignore[arg-type]
        },
        "pruning": {
            **pruned.settings,
            "sparsity_reached": pruned.sparsity,
            "target_reached": None if pruned.target is None else pruned.target.reached,
            "epochs": len(pruned.history),
            "search": None if plan.search is None else plan.search.to_json(),
            "channels": _channels(pruned),
        },
        "members": [_member(network) for network in networks] if len(networks) > 1 else [],
        "uncertainty": {**plan.uncertainty, "options": vars(plan.method)},
        **asdict(plan.answers),
        "answers": {"score": uncertain.score.name, "ood_score": uncertain.ood_score.name, **uncertain.record},
        "training": {**asdict(config), "augment": resolved},
        "seed": config.seed,
    }
    plain: dict[str, Any] = _plain(recipe)
    return plain


def _member(network: Shrunk) -> dict[str, Any]:
    """What tells a member of an ensemble from the others."""
    return {
        "seed": network.seed,
        "criterion": network.pruned.settings["criterion"],
        "perturbation": network.perturbation,
        "sparsity_reached": network.pruned.sparsity,
        "channels": _channels(network.pruned),
    }


def _channels(pruned: PruneResult) -> dict[str, list[int]]:
    return {layer.name: [layer.before, layer.after] for layer in pruned.layers}


def _plain(value: Any) -> Any:
    """Tuples as lists, so that a recipe equals its own JSON."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value


def _architecture(arch: str | Architecture | None, splits: Splits, origin: Origin) -> Architecture | None:
    if not isinstance(arch, str):
        return arch
    if splits.info.labels is None:
        raise DataError(
            f"arch={arch!r} needs the number of classes: pass an Architecture, or splits whose info has labels"
        )
    return Architecture(arch, len(splits.info.labels), origin.input_shape)


def _refuse_misfit(architecture: Architecture, dense: nn.Module) -> None:
    """A bundle that could not be rebuilt later is refused now."""
    differing = _differing(architecture.build(), dense)
    if differing is not None:
        name, built, given = differing
        raise ModelError(
            f"arch {architecture.reference!r} does not build the model given: {name} is {built} in the architecture "
            f"and {given} in the model"
        )


def _refuse_unlike(first: nn.Module, other: nn.Module, number: int) -> None:
    """A bundle rebuilds all members from one architecture."""
    differing = _differing(first, other)
    if differing is not None:
        name, one, two = differing
        raise ModelError(
            f"model {number} is of another architecture than the first: {name} is {one} in the first and {two} in it; "
            "the models of a list are of one architecture"
        )


def _differing(one: nn.Module, other: nn.Module) -> tuple[str, tuple[int, ...] | None, tuple[int, ...] | None] | None:
    """The first tensor that two models do not share in name and shape, with both shapes."""
    shapes = [{name: tuple(value.shape) for name, value in model.state_dict().items()} for model in (one, other)]
    names = (name for name in {**shapes[1], **shapes[0]} if shapes[0].get(name) != shapes[1].get(name))
    return next(((name, shapes[0].get(name), shapes[1].get(name)) for name in names), None)


def _export_dense(plain: UncertainModel, files: Mapping[str, Path]) -> list[str]:
    try:
        export_onnx(plain, files["dense"])
    except GateError as error:
        return [f"the dense model could not be timed in ONNX Runtime: {error}"]
    return []


def _with_cost(
    column: Evaluation, *, latency: Mapping[str, float] | None = None, training_seconds: float | None = None
) -> Evaluation:
    cost = column.cost
    if latency is not None:
        cost = replace(cost, latency_ms=dict(latency))
    if training_seconds is not None:
        cost = replace(cost, training_seconds=training_seconds)
    return replace(column, cost=cost)


def _near_chance(dense: Evaluation) -> list[str]:
    accuracy = dense.metrics["accuracy"].value
    chance = float(np.bincount(dense.labels).max()) / len(dense.labels)
    if accuracy > chance + 0.1 * (1 - chance):
        return []
    return [
        f"the dense model scores {accuracy:.3f} on its own data, near chance: a wrong --mean or --std, or another "
        "order of the classes, is the usual cause"
    ]


def suspicions(model: UncertainModel, splits: Splits, evaluation: Evaluation) -> list[str]:
    """Signs that a figure cannot be believed, each in a sentence."""
    found = []
    if splits.calibration is not None:
        # A calibrator that changes labels is right too often on the images that it was fitted on.
        relabels = model.calibrator.every_class
        plain = model.but(calibrator=Identity()) if relabels else model
        right, count = _right(plain, splits.calibration)
        test_right = int((evaluation.prediction.label == evaluation.labels).sum())
        if relabels:
            test_right, _ = _right(plain, splits.require("test", "the report card"))
        z = _two_shares(right, count, test_right, len(evaluation.labels))
        if z > 2.33:
            found.append(
                f"accuracy is {right / count:.4f} on the calibration split and "
                f"{test_right / len(evaluation.labels):.4f} on test, significantly higher "
                "(one-sided 1 %): the model may have been trained on calibration images"
            )
    prediction = evaluation.prediction
    bar = random_ause(prediction.probabilities, evaluation.labels)
    if evaluation.metrics["ause"].value > bar > 0:
        found.append(
            "the uncertainty ranks errors worse than a random order: "
            f"AUSE {evaluation.metrics['ause'].value:.4f}, random {bar:.4f}"
        )
    return found + _worse_than_random(evaluation)


def _worse_than_random(evaluation: Evaluation) -> list[str]:
    """Scores that would rank better the other way round."""
    found = []
    right = evaluation.metrics["error_auroc"].value
    if right < 0.5:
        found.append(f"the uncertainty tells errors from right answers worse than chance: error_auroc {right:.4f}")
    for name, figures in evaluation.ood.items():
        value = figures["auroc"].value
        if value < 0.5:
            found.append(
                f"the OOD score ranks {name} worse than chance, AUROC {value:.4f}: its images pass for in-distribution"
            )
    return found


def _right(model: UncertainModel, dataset: ImageDataset) -> tuple[int, int]:
    """Images classified right, and all of them."""
    (label,), truth = collect(lambda images: model(images).label, dataset)
    return int((label == truth).sum()), len(truth)


def _fidelity(model: UncertainModel) -> dict[str, float] | None:
    known = model.members.fidelity
    return None if known is None else {"samples": model.members.count, **asdict(known)}


def _two_shares(right: int, count: int, other_right: int, other_count: int) -> float:
    """z of the difference of two shares, pooled."""
    pooled = (right + other_right) / (count + other_count)
    spread = math.sqrt(pooled * (1 - pooled) * (1 / count + 1 / other_count))
    return 0.0 if spread == 0 else (right / count - other_right / other_count) / spread
