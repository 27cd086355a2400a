"""`compress-uq predict`: labels, confidences and uncertainties of images."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from csv import DictWriter
from pathlib import Path
from typing import Annotated, Any

import typer

import compress_uq as cuq
from compress_uq_cli import options as o
from compress_uq_cli.console import print_json, progress, show_table

__all__ = ["predict"]


def predict(
    artifact: Annotated[Path, typer.Argument(help="A bundle or an .onnx file.")],
    files: Annotated[list[Path], typer.Argument(help="Images, and folders of images.")],
    mean: o.Mean = None,
    std: o.Std = None,
    json: o.Json = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print the result as CSV on stdout.")] = False,
) -> None:
    """Say what images show, how sure that is, and how unlike the training data they are."""
    if json and csv:
        raise cuq.InputError("--json and --csv: both go to stdout, choose one")
    if artifact.is_dir():
        cuq.verify_files(artifact)
    model = cuq.OnnxPredictor(artifact / "model.onnx" if artifact.is_dir() else artifact)
    read = _pixels(model, mean or std) if model.takes_pixels else _normalised(model, mean, std)
    images = [image for file in files for image in (cuq.data.image_files(file) if file.is_dir() else [file])]
    labels = model.metadata["labels"]
    results: list[dict[str, Any]] = []
    with progress() as callback:
        for start in range(0, len(images), _TOGETHER):
            results += _results(model, images[start : start + _TOGETHER], read, labels)
            callback(cuq.Progress("predicting", len(results), len(images)))
    always = ("file", "label", "confidence", "uncertainty", "mutual_information", "ood_score")
    shown = (*always, *(name for name in ("accepted", "prediction_set") if name in results[0]))
    if not csv:
        show_table(f"{artifact}", shown, [[_text(result[column]) for column in shown] for result in results])
    if json:
        print_json(results)
    if csv:
        _print_csv(results)


_TOGETHER = 32
"""Images that are read and answered at a time."""

Reader = Callable[[Sequence[Path]], Any]


def _results(
    model: cuq.OnnxPredictor, files: Sequence[Path], read: Reader, labels: Sequence[str] | None
) -> list[dict[str, Any]]:
    """What is said of each image; a file that takes seeds gets 0 for all of them."""
    answers = model(read(files), [0] * len(files) if model.seeded else None)
    names = labels or [str(k) for k in range(answers.probabilities.shape[1])]
    return [
        {
            "file": str(file),
            "label": names[int(answers.label[i])],
            **{
                name: float(getattr(answers, name)[i])
                for name in ("confidence", "uncertainty", "entropy", "mutual_information", "variance", "ood_score")
            },
            **_decided(answers, names, i),
        }
        for i, file in enumerate(files)
    ]


def _normalised(model: cuq.OnnxPredictor, mean: str | None, std: str | None) -> Reader:
    recorded = model.metadata["input"]
    chosen_mean = o.numbers(mean, "--mean") or recorded["mean"]
    chosen_std = o.numbers(std, "--std") or recorded["std"]
    if chosen_mean is None or chosen_std is None:
        raise cuq.InputError(f"{model.path} does not record its normalisation: pass --mean and --std")
    normalisation = tuple(chosen_mean), tuple(chosen_std)
    return lambda files: cuq.data.read_images(files, model.image_shape, normalisation).numpy()


def _pixels(model: cuq.OnnxPredictor, normalisation: str | None) -> Reader:
    if normalisation is not None:
        raise cuq.InputError(f"{model.path} takes pixels and normalises them itself: leave out --mean and --std")
    plain = (0.0,), (1.0,)
    return lambda files: cuq.data.as_pixels(cuq.data.read_images(files, model.image_shape, plain), plain).numpy()


def _print_csv(results: Sequence[Mapping[str, Any]]) -> None:
    """One line for each image; the classes of a set are separated by semicolons."""
    writer = DictWriter(sys.stdout, list(results[0]), lineterminator="\n")
    writer.writeheader()
    for result in results:
        writer.writerow({name: ";".join(value) if isinstance(value, list) else value for name, value in result.items()})


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
