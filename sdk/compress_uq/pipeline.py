"""The whole product, top to bottom.

model + splits -> prune -> fine-tune -> fit uncertainty -> calibrate -> choose scores -> decide
-> evaluate -> export -> report card -> bundle
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Unpack, cast

import numpy as np
from torch import nn

from compress_uq._version import __version__
from compress_uq.bundle import Bundle, recipe_hash
from compress_uq.config import AnswerConfig, TrainingConfig
from compress_uq.data import Splits, identical_images, set_aside
from compress_uq.errors import DataError, GateError, InputError, ModelError
from compress_uq.export import export_onnx
from compress_uq.finishing import AnswerOptions, check_answers, finish, finish_model
from compress_uq.metrics import random_ause
from compress_uq.models import Architecture, refuse_non_finite
from compress_uq.predict import collect
from compress_uq.progress import ProgressCallback, silent
from compress_uq.pruning import PruneResult, PruningOptions, prune, pruning_share, resolve_criterion
from compress_uq.report import Evaluation, ReportCard, broken, evaluate, onnx_milliseconds
from compress_uq.search import Budget, SearchResult, search_sparsity
from compress_uq.shrinking import prune_and_finetune
from compress_uq.stages import ModelOrResult, Origin, unpack
from compress_uq.steps import (
    FinetuneResult,
    TrainingOptions,
    finetune,
    resolve_method,
    training_config,
)
from compress_uq.training import Epoch
from compress_uq.uncertain import UncertainModel
from compress_uq.uq import MSP, Method, Trained

__all__ = ["CompressionPlan", "compress", "plan_compression"]


class CompressOptions(PruningOptions, TrainingOptions, AnswerOptions, total=False):
    """What `compress` hands on to `prune`, to `finetune` and to the last steps."""


@dataclass(frozen=True)
class CompressionPlan:
    """What a run will do, found out before anything is trained."""

    pruned: PruneResult
    """The pruned model; where pruning itself trains, a stand-in of the same size."""
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


def plan_compression(
    model: ModelOrResult,
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
    dense, _ = unpack(model)
    method = resolve_method(uq)
    splits.require("test", "the report card")
    check_answers(answers, splits)
    splits = set_aside(splits, rules=answers.rules)
    refuse_non_finite(dense, "the model")
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
    # Where pruning trains, another criterion and a single step give the same sizes at once.
    outline: PruningOptions = pruning if share is None else {**pruning, **_outline(pruning)}
    pruned = prune(
        dense, splits.example(), splits=splits, training=config, seed=config.seed, progress=progress, **outline
    )
    described = method.describe(pruned.model, pruned.origin)
    warnings = list(splits.info.notes)
    functional = described.get("functional_dropout")
    if functional:
        names = ", ".join(str(name) for name in functional) if isinstance(functional, list) else str(functional)
        warnings.append(f"dropout called as a function in {names} is not a site: only dropout modules are sampled")
    for pair, count in identical_images(splits).items():
        warnings.append(f"{count} identical images are in both parts of {pair}")
    return CompressionPlan(
        pruned, pruning, share, method, described, answers, splits.info.calibration, tuple(warnings), search
    )


def compress(
    model: ModelOrResult,
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
        model: the trained classifier; it is not changed.
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
    dense, _ = unpack(model)
    dense_mode = {name: module.training for name, module in dense.named_modules()}
    if plan is None:
        plan = plan_compression(
            model, splits, uq=uq, training=training, budget=budget, progress=progress, **options
        )  # fmt: skip
    method, answers, origin = plan.method, plan.answers, plan.pruned.origin
    splits = set_aside(splits, rules=answers.rules)
    architecture = _architecture(arch, splits, origin)
    if architecture is not None:
        _refuse_misfit(architecture, dense)
    warnings = list(plan.warnings)

    def finished(tuned: FinetuneResult, name: str) -> UncertainModel:
        done = finish(tuned, splits, answers, name=name, device=config.device, progress=progress)
        warnings.extend(done.warnings)
        return done.model

    try:
        # The dense model, as it was given and calibrated on the same images.
        plain = UncertainModel(MSP().fit(Trained((dense,), origin.of_data(splits))), MSP(), origin.of_data(splits))
        dense_evaluation = evaluate(plain, splits, device=config.device, progress=progress, stage="dense")
        warnings += _near_chance(dense_evaluation)
        only_calibrated = AnswerConfig(calibration=answers.calibration)
        dense_calibrated = finish_model(
            plain, splits, only_calibrated, name="dense_calibrated", device=config.device, progress=progress
        )
        warnings += dense_calibrated.warnings
        dense_calibrated_evaluation = evaluate(
            dense_calibrated.model, splits, device=config.device, progress=progress, stage="dense calibrated"
        )

        # The compressed model.
        pruned, tuned = prune_and_finetune(
            dense, splits, pruning=plan.pruning, method=method, training=config, augment=augment, pruned=plan.pruned,
            progress=progress, work_dir=work_dir,
        )  # fmt: skip
        uncertain = finished(tuned, "compressed")
        recipe = _recipe(plan, pruned, config, splits, architecture, uncertain)
        evaluation = evaluate(uncertain, splits, device=config.device, progress=progress, stage="compressed")
        evaluation = _with_cost(evaluation, training_seconds=_seconds(pruned.history + tuned.history))

        # Its exported file, measured again, and timed beside one dense pass.
        with tempfile.TemporaryDirectory() as folder:
            files = {"onnx": Path(folder) / "model.onnx", "dense": Path(folder) / "dense.onnx"}
            export_onnx(uncertain, files["onnx"], recipe_hash=recipe_hash(recipe))
            onnx_evaluation = evaluate(files["onnx"], splits, device=config.device, progress=progress, stage="onnx")
            warnings += _export_dense(plain, files)
            assert origin.input_shape is not None
            latency = onnx_milliseconds({k: f for k, f in files.items() if f.is_file()}, origin.input_shape)
            content = files["onnx"].read_bytes()

        # The dense model given the same fine-tuning and uncertainty, if it was asked for.
        control_evaluation = None
        if control:
            # It drops where the compressed model does, whatever that costs on the dense one.
            beside = finetune(
                _Bare(dense, origin), splits, teacher=dense, method=method.as_prepared(tuned.model), training=config,
                progress=progress, stage="control", augment=augment,
                checkpoint=None if work_dir is None else work_dir / "control.pt",
            )  # fmt: skip
            control_model = finished(beside, "control")
            control_evaluation = _with_cost(
                evaluate(control_model, splits, device=config.device, progress=progress, stage="control"),
                training_seconds=_seconds(beside.history),
            )
    finally:
        for name, module in dense.named_modules():
            module.training = dense_mode[name]

    warnings += _suspicions(uncertain, splits, evaluation) + broken(evaluation.decisions, uncertain.record)
    card = ReportCard(
        dense=_with_cost(dense_evaluation, latency=latency.get("dense")),
        dense_calibrated=_with_cost(dense_calibrated_evaluation, latency=latency.get("dense")),
        compressed=_with_cost(evaluation, latency=latency["onnx"]),
        onnx=_with_cost(onnx_evaluation, latency=latency["onnx"]),
        control=control_evaluation,
        recipe=recipe,
        warnings=tuple(dict.fromkeys(warnings)),
    )
    return Bundle.build(uncertain, dense, card, content, architecture, splits.info.fingerprint)


@dataclass(frozen=True)
class _Bare:
    """The dense model as a stage's result, so that its own cost is what it is compared with."""

    model: nn.Module
    origin: Origin


def _sort(options: CompressOptions) -> tuple[PruningOptions, TrainingOptions, AnswerConfig]:
    """What is for `prune`, what is for training, and what is for the last steps."""
    pruning = {name: value for name, value in options.items() if name in PruningOptions.__annotations__}
    answers = {name: value for name, value in options.items() if name in AnswerOptions.__annotations__}
    tuning = {name: value for name, value in options.items() if name not in {**pruning, **answers}}
    return cast(PruningOptions, pruning), cast(TrainingOptions, tuning), AnswerConfig(**cast(AnswerOptions, answers))


def _outline(pruning: PruningOptions) -> PruningOptions:
    trains = resolve_criterion(pruning.get("criterion", "l1")).trains
    return {"schedule": "one-shot", "criterion": "l1"} if trains else {"schedule": "one-shot"}


def _seconds(history: Sequence[Epoch]) -> float:
    return sum(epoch.seconds for epoch in history)


def _recipe(
    plan: CompressionPlan,
    pruned: PruneResult,
    config: TrainingConfig,
    splits: Splits,
    architecture: Architecture | None,
    uncertain: UncertainModel,
) -> dict[str, Any]:
    """All that a run can be repeated from; plain values."""
    info = splits.info
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
            "channels": {layer.name: [layer.before, layer.after] for layer in pruned.layers},
        },
        "uncertainty": {**plan.uncertainty, "options": vars(plan.method)},
        **asdict(plan.answers),
        "answers": {"score": uncertain.score.name, "ood_score": uncertain.ood_score.name, **uncertain.record},
        "training": {**asdict(config), "augment": resolved},
        "seed": config.seed,
    }
    plain: dict[str, Any] = _plain(recipe)
    return plain


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
    built = {name: tuple(value.shape) for name, value in architecture.build().state_dict().items()}
    given = {name: tuple(value.shape) for name, value in dense.state_dict().items()}
    for name in {**given, **built}:
        if built.get(name) != given.get(name):
            raise ModelError(
                f"arch {architecture.reference!r} does not build the model given: {name} is {built.get(name)} in the "
                f"architecture and {given.get(name)} in the model"
            )


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


def _suspicions(model: UncertainModel, splits: Splits, evaluation: Evaluation) -> list[str]:
    """Signs that a figure cannot be believed."""
    found = []
    if splits.calibration is not None:
        (probabilities,), labels = collect(lambda images: model(images).probabilities, splits.calibration)
        right, count = int((probabilities.argmax(1) == labels).sum()), len(labels)
        test_right = int((evaluation.prediction.label == evaluation.labels).sum())
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
    return found


def _two_shares(right: int, count: int, other_right: int, other_count: int) -> float:
    """z of the difference of two shares, pooled."""
    pooled = (right + other_right) / (count + other_count)
    spread = math.sqrt(pooled * (1 - pooled) * (1 / count + 1 / other_count))
    return 0.0 if spread == 0 else (right / count - other_right / other_count) / spread
