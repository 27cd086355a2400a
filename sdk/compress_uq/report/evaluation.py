"""Measuring a model, whatever form it has: one column of the report card."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress_uq.cost import interleaved_milliseconds, measure_cost, on_device
from compress_uq.data import ImageDataset, Splits, as_pixels, check_labels, fit_images
from compress_uq.errors import ArtifactError, ModelError
from compress_uq.metrics import Figure, classification_figures, mean_figure, ood_figures, per_class_accuracy, wilson
from compress_uq.predict import collect_predictions
from compress_uq.progress import ProgressCallback, silent
from compress_uq.report.decisions import decision_figures
from compress_uq.runtime import OnnxPredictor, session
from compress_uq.stages import ModelsOrResults, unpack_all
from compress_uq.training import resolve_device
from compress_uq.types import Prediction
from compress_uq.uncertain import UncertainModel, as_given

__all__ = ["Cost", "Evaluation", "evaluate", "onnx_milliseconds"]

LATENCY_BATCHES = (1, 32)


@dataclass(frozen=True)
class Cost:
    """What a model costs; None where it cannot be told."""

    parameters: int | None
    macs: int | None
    size_bytes: int
    latency_ms: Mapping[str, float] = field(default_factory=dict)
    """Per batch, such as `onnxruntime_1`: one thread, batch 1."""
    training_seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "latency_ms": dict(self.latency_ms)}


@dataclass(frozen=True)
class Evaluation:
    """One column of the report card, and the answers it was measured on."""

    metrics: Mapping[str, Figure]
    ood: Mapping[str, Mapping[str, Figure]]
    per_class: Mapping[str, Figure]
    cost: Cost
    prediction: Prediction
    """Arrays over the test split."""
    labels: np.ndarray
    ood_scores: Mapping[str, np.ndarray]
    decisions: Mapping[str, Figure] = field(default_factory=dict)
    """What the decision rules came to on the test split; empty without a rule."""

    def to_json(self) -> dict[str, Any]:
        """The M of the contract: plain values, no arrays."""
        return {
            "metrics": {name: figure.to_json() for name, figure in self.metrics.items()},
            "ood": {s: {name: f.to_json() for name, f in figures.items()} for s, figures in self.ood.items()},
            "per_class": {name: figure.to_json() for name, figure in self.per_class.items()},
            "cost": self.cost.to_json(),
            "decisions": {name: figure.to_json() for name, figure in self.decisions.items()},
        }


def evaluate(
    model: ModelsOrResults | OnnxPredictor | str | os.PathLike[str],
    splits: Splits,
    *,
    device: str = "cpu",
    batch_size: int | None = None,
    workers: int = 0,
    progress: ProgressCallback = silent,
    stage: str = "evaluating",
) -> Evaluation:
    """Measure a model on the test split and the out-of-distribution sets.

    Args:
        model: an uncertain model, a plain classifier (its softmax is taken as it is), a stage's result, a list of
            classifiers or results (the mean softmax of an ensemble), or an exported file (path or `OnnxPredictor`), for
            which no torch model is needed.
        splits: needs `test`; `ood` adds the out-of-distribution figures.
        device: for torch models.

    Raises:
        DataError: no test split, labels out of range, or NaN among the images.
        ModelError: the model does not run on these images, or its answers to some are not finite.
    """
    test = splits.require("test", "evaluate")
    if isinstance(model, str | os.PathLike):
        model = OnnxPredictor(model)
    predictor: Callable[[Tensor], Prediction]
    with contextlib.ExitStack() as stack:
        if isinstance(model, OnnxPredictor):
            predictor, cost, labels = _of_file(model, splits), _onnx_cost(model), model.metadata.get("labels")
            target = torch.device("cpu")
        else:
            uncertain = _as_uncertain(model, splits)
            predictor, cost, labels = uncertain, _torch_cost(uncertain), uncertain.origin.labels
            target = resolve_device(device)
            stack.enter_context(on_device(uncertain, target))

        def answers(dataset: ImageDataset, what: str) -> tuple[Prediction, np.ndarray]:
            return collect_predictions(
                predictor,
                dataset,
                device=target,
                batch_size=batch_size,
                workers=workers,
                progress=progress,
                stage=f"{stage}: {what}",
            )

        prediction, truth = answers(test, "test")
        scores = {name: _finite(answers(dataset, name)[0].ood_score, name) for name, dataset in splits.ood.items()}
    classes = prediction.probabilities.shape[1]
    check_labels(torch.from_numpy(truth), classes)
    metrics = classification_figures(prediction.probabilities, truth, prediction.uncertainty)
    ood = {name: ood_figures(prediction.ood_score, score) for name, score in scores.items()}
    if ood:
        metrics["ood_auroc"] = mean_figure([figures["auroc"] for figures in ood.values()])
    names = labels or splits.info.labels or [str(k) for k in range(classes)]
    per_class = _per_class(prediction, truth, list(names))
    decided = decision_figures(prediction, truth)
    return Evaluation(metrics, ood, per_class, cost, prediction, truth, scores, decided)


def onnx_milliseconds(files: Mapping[str, bytes | Path], shape: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """Latency of exported files side by side, one thread, in turns: {name: {"onnxruntime_1": ms, ...}}."""
    sessions = {
        name: session(content if isinstance(content, bytes) else str(content), threads=1)
        for name, content in files.items()
    }
    result: dict[str, dict[str, float]] = {name: {} for name in files}
    for batch in LATENCY_BATCHES:
        images = np.random.default_rng(batch).normal(size=(batch, *shape)).astype(np.float32)
        runs = {name: _run(made, images) for name, made in sessions.items()}
        for name, milliseconds in interleaved_milliseconds(runs).items():
            result[name][f"onnxruntime_{batch}"] = milliseconds
    return result


def _finite(scores: np.ndarray, name: str) -> np.ndarray:
    lost = int((~np.isfinite(scores)).sum())
    if lost:
        raise ModelError(
            f"out-of-distribution set {name!r}: the OOD score of {lost} of {len(scores)} images is NaN or infinite, as "
            "where logits overflow: scale these images as those of the model's training, or leave the set out"
        )
    return scores


def _run(made: Any, images: np.ndarray) -> Callable[[], object]:
    return lambda: made.run(None, {"images": images})


def _of_file(onnx: OnnxPredictor, splits: Splits) -> Callable[[Tensor], Prediction]:
    """A file that takes seeds gets the same one for every image, so that a figure can be measured again.

    One that takes pixels gets those that the splits were normalised from, and where it resizes them itself, images of
    the model's own size scaled to what it is fed.
    """
    recorded = onnx.metadata["input"]
    mean, std = (getattr(splits.info, name) or recorded[name] for name in ("mean", "std"))

    def fed(images: Tensor) -> Tensor:
        pixels = as_pixels(images, (mean, std))
        if list(images.shape[1:]) != recorded["shape"] or tuple(pixels.shape[1:]) == onnx.input_shape:
            return pixels
        return fit_images(pixels.permute(0, 3, 1, 2), onnx.image_shape).permute(0, 2, 3, 1)

    def predict(images: Tensor) -> Prediction:
        seed = np.zeros(len(images), np.int64) if onnx.seeded else None
        return onnx((fed(images) if onnx.takes_pixels else images).numpy(), seed)

    return predict


def _as_uncertain(model: ModelsOrResults, splits: Splits) -> UncertainModel:
    """A plain classifier is measured as its softmax stands."""
    models, origin = unpack_all(model)
    if len(models) == 1 and isinstance(models[0], UncertainModel):
        return models[0]
    return as_given(models, origin.of_data(splits))


def _torch_cost(model: UncertainModel) -> Cost:
    assert model.origin.input_shape is not None
    counted = measure_cost(model, model.origin.input_shape)
    return Cost(counted.parameters, counted.macs, counted.size_bytes)


def _onnx_cost(onnx: OnnxPredictor) -> Cost:
    recorded = onnx.metadata
    return Cost(recorded.get("parameters"), recorded.get("macs"), onnx.path.stat().st_size)


def _per_class(prediction: Prediction, truth: np.ndarray, names: list[str]) -> dict[str, Figure]:
    """Accuracy of each class with a Wilson interval, which needs no resampling."""
    values = per_class_accuracy(prediction.probabilities, truth)
    if len(names) != len(values):
        raise ArtifactError(
            f"the model has {len(values)} classes and the data {len(names)}: they do not belong together"
        )
    counts = np.bincount(truth, minlength=len(values))
    return {name: wilson(float(p), int(n)) for name, p, n in zip(names, values, counts, strict=True)}
