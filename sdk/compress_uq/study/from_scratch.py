"""Runs that train a network with an uncertainty method and measure it, unpruned: how methods compare by themselves.

Beside the package's own figures stand those of the TRADI slides (`paper_…`), by their definitions: logits of the
members averaged before the softmax, in-distribution as the positive class, an ECE that pools both sets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress_uq.choosing import check_validation
from compress_uq.config import AnswerConfig, TrainingConfig
from compress_uq.cost import measure_cost, on_device
from compress_uq.data import ImageDataset, Splits, check_data_names, hold_out, load_splits
from compress_uq.errors import InputError
from compress_uq.finishing import check_answers, finish
from compress_uq.inputs import configure_method
from compress_uq.metrics import METRICS, accuracy, nll, ood_aupr_in, ood_auroc, ood_fpr95_in, paper
from compress_uq.models import Architecture, versioned
from compress_uq.predict import collect
from compress_uq.report import Evaluation, evaluate
from compress_uq.stages import Origin
from compress_uq.steps import FinetuneResult, check_epochs, finetune
from compress_uq.study.kind import Context, Kind, Outcome
from compress_uq.study.settings import METHOD_HINTS, as_texts, changed, configuration
from compress_uq.study.values import conform, plain_hints, several
from compress_uq.training import Epoch, resolve_device
from compress_uq.uncertain import UncertainModel
from compress_uq.uq import Method

__all__ = ["FromScratchKind", "FromScratchSettings"]

_NO_BEARING = frozenset({"data_root", "device", "workers"})
_OOD = ("auroc", "aupr", "fpr95")
_OOD_IN = {"ood_aupr_in": ood_aupr_in, "ood_fpr95_in": ood_fpr95_in}
"""Of the same score, in-distribution as the positive class, as the slides have it."""
_PAPER = ("paper_nll", "paper_accuracy", "paper_auroc", "paper_aupr", "paper_fpr95", "paper_ece")
_COSTS = ("training_seconds", "networks", "parameters", "macs", "macs_share")


@dataclass(frozen=True)
class FromScratchSettings:
    """All that one run is made from."""

    arch: str
    data: str
    method: Method
    data_root: str = "data"
    arch_option: Mapping[str, Any] = field(default_factory=dict)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    ood: tuple[str, ...] = ()
    answers: AnswerConfig = field(default_factory=AnswerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


_OWN: dict[str, Any] = {
    name: hint
    for name, hint in get_type_hints(FromScratchSettings).items()
    if name not in ("method", "answers", "training")
} | {"uq": str, "uq_option": Mapping[str, Any], "ood": str | tuple[str, ...]}
_ANSWERS = plain_hints(get_type_hints(AnswerConfig))
_TRAINING = plain_hints(get_type_hints(TrainingConfig))


class FromScratchKind(Kind[FromScratchSettings]):
    """Train with a method, fit it, calibrate, measure; networks that a method only looks at afterwards are shared."""

    shown = ("accuracy", "nll", "ece", "ause", "ood_auroc", "training_seconds")
    axis = "uq"
    settings = frozenset({*_OWN, *METHOD_HINTS, *_ANSWERS, *_TRAINING})
    measures = frozenset({*METRICS.names, *_PAPER, *_COSTS, *(f"ood_{name}" for name in _OOD), *_OOD_IN})
    without_bearing = _NO_BEARING

    def read(self, values: Mapping[str, Any]) -> FromScratchSettings:
        """The settings; the training's are those of `TrainingConfig` where they are not given."""
        for name in ("arch", "data"):
            if name not in values:
                raise InputError(f"a run needs {name}")
        hints = {**METHOD_HINTS, **_OWN, **_ANSWERS, **_TRAINING}
        given = {name: conform(name.replace("_", "-"), value, hints[name]) for name, value in values.items()}
        training = TrainingConfig(**_part(given, _TRAINING))
        answers = AnswerConfig(**_part(given, _ANSWERS))
        check_answers(answers, None)
        method, _ = configure_method(
            given.get("uq", "msp"),
            {**_part(given, METHOD_HINTS), "seed": training.seed},
            as_texts(given.get("uq_option", {})),
        )
        check_validation(answers.ood_score, ())
        check_epochs(method, training.epochs)
        own = _part(given, _OWN)
        own = {name: value for name, value in own.items() if name not in ("uq", "uq_option")}
        own["ood"] = several(own.get("ood", ()))
        check_data_names(own["data"], own["ood"])
        return FromScratchSettings(**own, method=method, answers=answers, training=training)

    def identity(self, settings: FromScratchSettings) -> Mapping[str, Any]:
        """All settings that the result depends on."""
        return {
            **_of_data(settings),
            "ood": settings.ood,
            "uq": configuration(settings.method),
            "answers": changed(settings.answers),
            "training": changed(settings.training),
        }

    def run(self, settings: FromScratchSettings, context: Context) -> Outcome:
        """Train what has to be trained, or take what another run trained; fit, calibrate, measure."""
        splits = context.shared.remembered(
            {**_of_data(settings), "ood": settings.ood, "held": settings.training.seed}, lambda: _splits(settings)
        )
        check_answers(settings.answers, splits)
        tuned = [_trained(settings, splits, number, context) for number in range(settings.method.networks)]
        done = finish(
            tuned if len(tuned) > 1 else tuned[0], splits, settings.answers, name="the model",
            device=settings.training.device, progress=context.progress,
        )  # fmt: skip
        evaluation = evaluate(done.model, splits, device=settings.training.device, progress=context.progress)
        single = sum(p.numel() for p in tuned[0].model.parameters())
        assert evaluation.cost.macs is not None
        assert done.model.origin.dense_cost is not None
        measures: dict[str, float | None] = {
            **{name: figure.to_json()["value"] for name, figure in evaluation.metrics.items()},
            **_ood(evaluation),
            **_paper(done.model, splits, settings, context),
            "training_seconds": sum(epoch.seconds for result in tuned for epoch in result.history),
            "networks": len(done.model.members.networks),
            "parameters": single * len(done.model.members.networks),
            "macs": evaluation.cost.macs,
            "macs_share": evaluation.cost.macs / done.model.origin.dense_cost.macs,
        }
        return Outcome(measures, (*splits.info.notes, *done.warnings))

    def higher_is_better(self, measure: str) -> bool:
        """As the list of metrics has it."""
        name = measure.removeprefix("paper_").removeprefix("ood_")
        return (
            name.removesuffix("_in") in ("auroc", "aupr")
            or (measure in METRICS and METRICS[measure] == "higher")
            or name == "accuracy"
        )


def _splits(settings: FromScratchSettings) -> Splits:
    splits = load_splits(
        settings.data, root=settings.data_root, mean=settings.mean, std=settings.std, ood=settings.ood, reserve=False
    )
    return hold_out(splits, seed=settings.training.seed) if settings.answers.calibration != "none" else splits


def _trained(settings: FromScratchSettings, splits: Splits, number: int, context: Context) -> FinetuneResult:
    """One network; a method that has no part in the training takes what any other such method trained."""
    labels = splits.info.labels or ()
    shape = tuple(splits.example().shape[1:])
    architecture = Architecture(settings.arch, len(labels), shape, settings.arch_option)
    config = dataclasses.replace(settings.training, seed=settings.training.seed + number)
    fresh = architecture.build(config.seed)
    method = settings.method
    origin = Origin(input_shape=shape, dense_cost=measure_cost(fresh, shape))
    partakes = method.trained_apart
    identity = {
        **_of_data(settings),
        "held_out": None if splits.info.held_out is None else settings.training.seed,
        "training": changed(config),
        "method": configuration(method) if partakes else None,
    }

    def train(out: Path, state: Path) -> None:
        done = finetune(
            _Fresh(fresh, origin), splits, method=method if partakes else None, training=config,
            progress=context.progress, stage=f"training {number + 1}/{method.networks}", checkpoint=state,
        )  # fmt: skip
        observed = {f"observed.{k}": v for k, v in (done.observed or {}).items()}
        weights = {f"model.{k}": v.contiguous().clone() for k, v in done.model.state_dict().items()}
        history = torch.tensor([[e.loss, e.accuracy, e.seconds] for e in done.history], dtype=torch.float64)
        save_file({**weights, **observed, "history": history}, out)

    kept = load_file(context.shared.file("network.safetensors", identity, train))
    network = method.prepare(fresh, origin) if partakes else fresh
    network.load_state_dict(versioned(network, _under(kept, "model.")))
    return FinetuneResult(
        network.eval(),
        tuple(Epoch(*row) for row in kept["history"].tolist()),
        _under(kept, "observed.") or None,
        method,
        origin.of_data(splits),
    )


@dataclass(frozen=True)
class _Fresh:
    """An untrained network as a stage's result, so that its own cost is what it is compared with."""

    model: nn.Module
    origin: Origin


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _ood(evaluation: Evaluation) -> dict[str, float | None]:
    """Means over the sets."""
    if not evaluation.ood:
        return {}
    known, foreign = evaluation.prediction.ood_score, evaluation.ood_scores.values()
    found: dict[str, float | None] = {
        f"ood_{name}": float(np.mean([figures[name].value for figures in evaluation.ood.values()])) for name in _OOD
    }
    return found | {
        name: float(np.mean([measure(known, scores) for scores in foreign])) for name, measure in _OOD_IN.items()
    }


def _paper(
    model: UncertainModel, splits: Splits, settings: FromScratchSettings, context: Context
) -> dict[str, float | None]:
    """The slides' figures: of the softmax of the members' mean logit, its maximum the confidence; means over sets."""

    target = resolve_device(settings.training.device)

    def answers(dataset: ImageDataset) -> tuple[np.ndarray, np.ndarray]:
        with on_device(model, target):
            (logits,), labels = collect(
                lambda images: model.member_logits(images).transpose(0, 1), dataset, device=target,
                progress=context.progress, stage="members",
            )  # fmt: skip
        return paper.mean_logit_softmax(logits.transpose(1, 0, 2)), labels

    probabilities, labels = answers(splits.require("test", "the figures of the slides"))
    found: dict[str, float | None] = {
        "paper_nll": nll(probabilities, labels),
        "paper_accuracy": accuracy(probabilities, labels),
    }
    foreign = [answers(dataset)[0] for dataset in splits.ood.values()]
    if not foreign:
        return found
    inside = 1 - probabilities.max(1)
    return found | {
        "paper_auroc": float(np.mean([ood_auroc(inside, 1 - p.max(1)) for p in foreign])),
        "paper_aupr": float(np.mean([paper.tradi_aupr(inside, 1 - p.max(1)) for p in foreign])),
        "paper_fpr95": float(np.mean([paper.tradi_fpr95(inside, 1 - p.max(1)) for p in foreign])),
        "paper_ece": float(np.mean([paper.pooled_ece(probabilities, labels, p) for p in foreign])),
    }


def _of_data(settings: FromScratchSettings) -> dict[str, Any]:
    """What tells one architecture on its data from another."""
    kept = ("arch", "arch_option", "data", "mean", "std")
    return {**{name: getattr(settings, name) for name in kept}, "calibrated": settings.answers.calibration != "none"}


def _part(values: Mapping[str, Any], names: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in names}
