"""Which scores a model answers with: named by the caller, or chosen on out-of-distribution images that no figure is
reported on."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from compress_uq.cost import on_device
from compress_uq.data import ImageDataset, Splits, balanced_sample, labels_of, shared_images
from compress_uq.errors import CalibrationError, DataError, UncertaintyError
from compress_uq.fitted import Plain
from compress_uq.metrics import ood_auroc
from compress_uq.predict import collect
from compress_uq.progress import ProgressCallback, silent
from compress_uq.scores import SCORES, Answers, Score, TrainingFeatures
from compress_uq.steps import cross_calibrators, members_of_images
from compress_uq.training import resolve_device
from compress_uq.uncertain import UncertainModel, answers_of

__all__ = ["AUTO", "check_members", "check_scores", "check_validation", "choose_scores", "training_features"]

AUTO = "auto"
_TRAINING_IMAGES = 10_000
"""Scores of features are fitted on at most so many."""
_UNLIKE = 0.2
"""Difference of logits from those of a linear classifier, as a share of their spread, that is still like them."""


def choose_scores(
    model: UncertainModel,
    splits: Splits,
    *,
    score: str = "confidence",
    ood_score: str = "entropy",
    options: Mapping[str, Mapping[str, Plain]] | None = None,
    device: str = "cpu",
    progress: ProgressCallback = silent,
) -> UncertainModel:
    """A copy of a model that answers with other scores, and without an acceptance rule where `score` changes.

    Args:
        model: calibrated, where it is to be calibrated: scores of probabilities see the calibrated ones.
        splits: scores of features need `train`. `auto` needs `validation_ood` and, of in-distribution images,
            `decision` or else `calibration`; it never looks at `ood` and `test`, and goes without scores of features
            where there is no `train`.
        score: behind `uncertainty`, by name.
        ood_score: behind `ood_score`, by name, or `auto`: the one with the largest mean AUROC over the validation
            sets. All candidates with their AUROCs are in the model's `record`.
        options: of scores, by name, such as `{"knn": {"bank": 1000, "neighbours": 5}}`.

    Raises:
        UnknownNameError: no such score, or option.
        UncertaintyError: a score that this model cannot give, such as one of members where there is one.
        DataError: a split is missing, or a validation set holds images of a reported set.
    """
    check_scores(score, ood_score, splits)
    given = dict(options or {})
    for name in given:
        SCORES[name]
    check_members(score, ood_score, model.members.count)
    named = [SCORES[score], *([] if ood_score == AUTO else [SCORES[ood_score]])]
    for kind in named:
        if kind.of_features and model.members.head is None:
            raise UncertaintyError(f"score {kind.name!r} looks at features, and the model's classifier was not found")
    training = None
    of_features = ood_score == AUTO or any(kind.of_features for kind in named)
    if of_features and splits.train is not None and model.members.head is not None:
        training = training_features(model, splits.train, device=device, progress=progress)
    record = {name: value for name, value in model.record.items() if name != "ood_score_choice"}
    if ood_score == AUTO:
        candidates, left_out = _candidates(model, training, given)
        chosen, found = _best(model, candidates, splits, device=device, progress=progress)
        record["ood_score_choice"] = {**found, "left_out": left_out}
    else:
        chosen = SCORES[ood_score].fit(training, given.get(ood_score))
    if score == model.score.name and score not in given:
        return model.but(ood_score=chosen, record=record)
    record.pop("acceptance", None)
    fitted = SCORES[score].fit(training, given.get(score))
    return model.but(score=fitted, ood_score=chosen, acceptance=None, record=record)


def check_scores(score: str, ood_score: str, splits: Splits | None) -> None:
    """Refuse, before any work, names and splits that cannot be; None checks the names alone.

    Raises:
        UnknownNameError: no such score.
        DataError: a split is missing, or a validation set holds images of a reported set.
    """
    kinds = [SCORES[score], *([] if ood_score == AUTO else [SCORES[ood_score]])]
    if splits is None:
        return
    for kind in kinds:
        if kind.of_features:
            splits.require("train", f"score {kind.name!r}")
    if ood_score != AUTO:
        return
    check_validation(ood_score, splits.validation_ood)
    _in_distribution(splits)
    _refuse_reported(splits)


def check_validation(ood_score: str, validation_ood: Collection[str]) -> None:
    """Refuse to choose a score without out-of-distribution sets to choose on.

    Raises:
        DataError: names what is missing.
    """
    if ood_score == AUTO and not validation_ood:
        raise DataError(
            "ood_score 'auto' chooses on out-of-distribution images that no figure is reported on: pass "
            "--validation-ood (validation_ood= of Splits), or name a score"
        )


def check_members(score: str, ood_score: str, members: int) -> None:
    """Refuse scores that compare members where there is one.

    Raises:
        UncertaintyError: names the score.
    """
    for name in (score, ood_score):
        if members == 1 and name != AUTO and SCORES[name].of_members:
            raise UncertaintyError(f"score {name!r} compares members, and the model has one: choose another score")


def training_features(
    model: UncertainModel, dataset: ImageDataset, *, device: str = "cpu", progress: ProgressCallback = silent
) -> TrainingFeatures:
    """What enters the classifiers for at most 10,000 training images, class-balanced, in one pass.

    Raises:
        UncertaintyError: the classifier is not known, or a feature is not finite.
    """
    if len(dataset) > _TRAINING_IMAGES:  # type: ignore[arg-type]
        dataset = Subset(dataset, balanced_sample(labels_of(dataset), _TRAINING_IMAGES).tolist())

    def features(images: Tensor) -> tuple[Tensor, Tensor]:
        logits, entering = model.members.with_features(images)
        return logits.mean(0), entering.transpose(0, 1)

    target = resolve_device(device)
    with on_device(model, target):
        (logits, entering), labels = collect(
            features, dataset, device=target, progress=progress, stage="features of training images"
        )
    weight, bias = _classifiers(model, entering.shape[2])
    if weight is not None and bias is not None and not _linear(logits, entering, weight, bias):
        weight, bias = None, None
    return TrainingFeatures(entering.transpose(1, 0, 2), labels, logits, weight, bias)


def _linear(logits: np.ndarray, entering: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> bool:
    """Whether logits (N, K) are what the classifiers make of their features (N, G, D), mean over networks, roughly.

    A log-softmax or a ReLU after the classifier makes them something else. Roughly, since dropout behind the features
    and the probit link change logits a little.
    """
    linear = np.einsum("ngd,gkd->nk", entering, weight) / len(weight) + bias.mean(0)
    if linear.shape != logits.shape:
        return False
    spread = float(np.square(logits - logits.mean()).mean())
    return float(np.square(logits - linear).mean()) <= _UNLIKE**2 * spread


def _classifiers(model: UncertainModel, width: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Weights (G, K, D) and biases (G, K) of classifiers, fully connected or 1x1 convolutions; None for others."""
    assert model.members.head is not None
    heads = [network.get_submodule(model.members.head) for network in model.members.networks]
    weights = [_plain(head.weight).flatten(1) for head in heads]
    if any(weight.shape[1] != width for weight in weights):
        return None, None
    biases = [torch.zeros(weights[0].shape[0]) if head.bias is None else _plain(head.bias) for head in heads]
    return torch.stack(weights).numpy(), torch.stack(biases).numpy()


def _plain(tensor: Any) -> Tensor:
    kept: Tensor = tensor.detach().cpu().float()
    return kept


def _candidates(
    model: UncertainModel, training: TrainingFeatures | None, options: Mapping[str, Mapping[str, Plain]]
) -> tuple[dict[str, Score], dict[str, str]]:
    """Every score that this model can give, and why the others are left out."""
    fitted: dict[str, Score] = {}
    left_out: dict[str, str] = {}
    for entry in SCORES:
        if entry.value.of_members and model.members.count == 1:
            left_out[entry.name] = "the model has one member"
        elif entry.value.of_features and training is None:
            known = model.members.head is not None
            left_out[entry.name] = "no train split" if known else "the model's classifier was not found"
        else:
            try:
                fitted[entry.name] = entry.value.fit(training, options.get(entry.name))
            except UncertaintyError as error:
                left_out[entry.name] = str(error)
    return fitted, left_out


def _best(
    model: UncertainModel, candidates: Mapping[str, Score], splits: Splits, *, device: str, progress: ProgressCallback
) -> tuple[Score, dict[str, Any]]:
    """The candidate with the largest mean AUROC, the first among equals, and the table."""
    names = tuple(candidates)
    modules = nn.ModuleList(candidates.values())
    of_features = any(score.of_features for score in candidates.values())
    low, images = _inside(model, modules, splits, of_features, device=device, progress=progress)

    def scores(batch: Tensor) -> tuple[Tensor, ...]:
        logits, features = model.members.with_features(batch) if of_features else (model.members(batch), None)
        return _scored(modules, answers_of(logits, features, model.calibrator))

    target = resolve_device(device)
    high = {}
    with on_device(model, target), on_device(modules, target):
        for name, dataset in splits.validation_ood.items():
            stage = f"choosing a score: {name}"
            high[name], _ = collect(scores, dataset, device=target, progress=progress, stage=stage)
    table = {n: {s: ood_auroc(low[i], columns[i]) for s, columns in high.items()} for i, n in enumerate(names)}
    means = {name: float(np.mean(list(row.values()))) for name, row in table.items()}
    chosen = max(names, key=lambda name: means[name])
    record = {
        "chosen": chosen, "in_distribution": images, "validation_sets": list(high), "auroc": table, "mean_auroc": means,
    }  # fmt: skip
    return candidates[chosen], record


def _inside(
    model: UncertainModel,
    modules: nn.ModuleList,
    splits: Splits,
    of_features: bool,
    *,
    device: str,
    progress: ProgressCallback,
) -> tuple[list[np.ndarray], str]:
    """Each score (N,) of held-out images, and which they are.

    Images that the calibrator was fitted on are cross-fitted: each class-balanced half gets its probabilities from a
    calibrator that was fitted on the other.

    Raises:
        UncertaintyError: nothing fits a half.
    """
    dataset, source = _in_distribution(splits)
    logits, features, labels = members_of_images(
        model, dataset, features=of_features, device=device, progress=progress, stage="choosing a score"
    )
    parts = [(list(range(len(labels))), model.calibrator)]
    if splits.decision is None and model.calibrator.name != "none":
        source += ", cross-fitted in two halves"
        try:
            parts = cross_calibrators(model.calibrator.name, logits, labels)
        except CalibrationError as error:
            raise UncertaintyError(
                f"ood_score 'auto' needs images that the calibrator did not see, and {len(labels)} calibration images "
                f"are too few to share ({error}); give a decision split, or name a score"
            ) from error
    found = [np.empty(len(labels), np.float32) for _ in modules]
    with torch.inference_mode():
        for own, calibrator in parts:
            entering = None if features is None else torch.from_numpy(features[:, own])
            answers = answers_of(torch.from_numpy(logits[:, own]), entering, calibrator)
            for column, values in zip(found, _scored(modules, answers), strict=True):
                column[own] = values.numpy()
    return found, source


def _scored(modules: nn.ModuleList, answers: Answers) -> tuple[Tensor, ...]:
    return tuple(score(answers) for score in modules)


def _in_distribution(splits: Splits) -> tuple[ImageDataset, str]:
    """Held-out images, and which they are.

    Raises:
        DataError: there are none.
    """
    if splits.decision is not None:
        return splits.decision, "the decision split"
    return splits.require("calibration", "ood_score 'auto'"), "the calibration split"


def _refuse_reported(splits: Splits) -> None:
    """A score chosen on the images of its own figure would flatter itself."""
    for name, dataset in splits.validation_ood.items():
        for reported, other in splits.ood.items():
            if name == reported or shared_images(dataset, other):
                raise DataError(
                    f"the validation set {name!r} and the reported set {reported!r} share images: a score is not "
                    "chosen on what it is measured on, pass another validation set"
                )
