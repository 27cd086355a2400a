"""`compress-uq predict`: labels, confidences and uncertainties of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import compress_uq as cuq
from compress_uq_cli import options as o
from compress_uq_cli.console import print_json, show_table

__all__ = ["predict"]


def predict(
    artifact: Annotated[Path, typer.Argument(help="A bundle or an .onnx file.")],
    files: Annotated[list[Path], typer.Argument(help="Images.")],
    mean: o.Mean = None,
    std: o.Std = None,
    json: o.Json = False,
) -> None:
    """Say what images show, how sure that is, and how unlike the training data they are."""
    if artifact.is_dir():
        cuq.verify_files(artifact)
    model = cuq.OnnxPredictor(artifact / "model.onnx" if artifact.is_dir() else artifact)
    recorded = model.metadata
    images = _pixels(model, files, mean or std) if model.takes_pixels else _normalised(model, files, mean, std)
    answers = model(images, [0] * len(images) if model.seeded else None)
    labels = recorded["labels"] or [str(k) for k in range(answers.probabilities.shape[1])]
    results = [
        {
            "file": str(file),
            "label": labels[int(answers.label[i])],
            **{
                name: float(getattr(answers, name)[i])
                for name in ("confidence", "uncertainty", "entropy", "mutual_information", "variance", "ood_score")
            },
            **_decided(answers, labels, i),
        }
        for i, file in enumerate(files)
    ]
    always = ("file", "label", "confidence", "uncertainty", "mutual_information", "ood_score")
    shown = (*always, *(name for name in ("accepted", "prediction_set") if name in results[0]))
    rows = [[_text(result[column]) for column in shown] for result in results]
    show_table(f"{artifact}", shown, rows)
    if json:
        print_json(results)


def _normalised(model: cuq.OnnxPredictor, files: Sequence[Path], mean: str | None, std: str | None) -> Any:
    recorded = model.metadata["input"]
    chosen_mean = o.numbers(mean, "--mean") or recorded["mean"]
    chosen_std = o.numbers(std, "--std") or recorded["std"]
    if chosen_mean is None or chosen_std is None:
        raise cuq.InputError(f"{model.path} does not record its normalisation: pass --mean and --std")
    return cuq.data.read_images(files, model.image_shape, (tuple(chosen_mean), tuple(chosen_std))).numpy()


def _pixels(model: cuq.OnnxPredictor, files: Sequence[Path], normalisation: str | None) -> Any:
    if normalisation is not None:
        raise cuq.InputError(f"{model.path} takes pixels and normalises them itself: leave out --mean and --std")
    plain = (0.0,), (1.0,)
    return cuq.data.as_pixels(cuq.data.read_images(files, model.image_shape, plain), plain).numpy()


def _decided(answers: cuq.Prediction, labels: Sequence[str], image: int) -> dict[str, Any]:
    """Whether the answer is accepted, and the names of the classes in its set, as far as there are rules."""
    decided: dict[str, Any] = {}
    if answers.accepted is not None:
        decided["accepted"] = bool(answers.accepted[image])
    if answers.prediction_set is not None:
        decided["prediction_set"] = [labels[k] for k in answers.prediction_set[image].nonzero()[0]]
    return decided


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else f"{value:.4f}"
