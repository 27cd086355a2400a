"""A bundle calibrated again on newer data: the weights stay, bit by bit, and only what was fitted on them changes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from compress_uq.bundle import Bundle, recipe_hash
from compress_uq.config import Guarantees
from compress_uq.data import Splits, identical_images, load_splits, set_aside
from compress_uq.deciding import fit_rules, promised
from compress_uq.errors import DataError, DecisionError
from compress_uq.export import export_onnx
from compress_uq.progress import ProgressCallback, silent
from compress_uq.report import (
    Evaluation,
    broken,
    calibration_change,
    conventions,
    evaluate,
    method_lines,
    of_compressed,
    onnx_milliseconds,
    suspicions,
    table_rows,
    uncalibrated,
)
from compress_uq.report.page import render_page
from compress_uq.steps import calibrate
from compress_uq.uncertain import UncertainModel

__all__ = ["load_new_data", "recalibrate"]

_PARTS = ("train", "val", "test", "calibration")
_SHOWN = ("accuracy", "nll", "brier", "ece")
_FIRST_RUN = "first run: "
_LEFT_OUT = "a decision rule of the old bundle is left out: "


def load_new_data(
    bundle: Bundle,
    name: str,
    *,
    root: str | os.PathLike[str] = "data",
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Splits:
    """Splits to calibrate a bundle on, of a named set, a folder or a `package.module:callable`.

    A folder of class folders without train and test below is new as a whole: a class-balanced fifth of it is the test
    split, the rest calibrates. Anything else is divided as for `prune`, and its training images are left alone, since
    the model may have seen them.

    Args:
        bundle: one whose model can be rebuilt.
        name: as in `load_splits`.
        root: where the named sets lie.
        mean, std: normalisation; by default the bundle's.

    Raises:
        DataError: the data are unknown or unusable.
    """
    origin = bundle.origin
    given: dict[str, Any] = {
        "root": Path(root), "mean": mean or origin.mean, "std": std or origin.std, "input_shape": origin.input_shape,
    }  # fmt: skip
    if Path(name).is_dir() and not any((Path(name) / part).is_dir() for part in _PARTS):
        whole = load_splits(name, reserve=False, **given)
        if whole.info.fingerprint != bundle.fingerprint:
            info = replace(whole.info, calibration="four fifths of the folder; figures are on the other fifth")
            return replace(whole, train=None, calibration=whole.train, info=info)
    splits = replace(load_splits(name, **given), train=None)
    if not splits.info.calibration_from_test:
        return splits
    calibration, test = (len(splits.require(part, "calibrate")) for part in ("calibration", "test"))  # type: ignore[arg-type]
    source = (
        f"a class-balanced fifth of the test split ({calibration} images), since a bundle does not keep which training "
        f"images its model never saw; figures are on the other {test}"
    )
    return replace(splits, info=replace(splits.info, calibration=source))


def recalibrate(
    bundle: Bundle,
    splits: Splits,
    *,
    method: str | None = None,
    device: str = "cpu",
    progress: ProgressCallback = silent,
) -> Bundle:
    """A new bundle with the same weights, calibrated on other images, exported again and measured on their test split.

    Its card keeps the columns of the dense model as they were, named as of the first run, and so are warnings about
    them; `compressed`, `onnx` and `calibration` are measured anew, and `recalibration` holds the figures before and
    after, on the same images. `class_changes` is empty: the dense model does not answer for these images.

    Args:
        bundle: one whose model can be rebuilt.
        splits: needs `calibration` (unless the method is `none`) and `test`.
        method: a calibrator's name, or `auto`; by default the bundle's own, and `temperature` for one without.
        device: where the members are run.
        progress: called as the work goes on.

    Raises:
        ArtifactError: the bundle names no architecture to rebuild it from.
        DataError: a split that is missing, or other classes than the bundle's.
        CalibrationError: nothing to fit.
        GateError: the file that was exported again fails a gate.
    """
    old = bundle.model
    splits.require("test", "the report card")
    _refuse_other_classes(old, splits)
    if method is None:
        method = "temperature" if old.calibrator.name == "none" else old.calibrator.name
    # What a set rule chose for itself, it chooses again on the newer images.
    rules = replace(promised(old), options=None)
    splits = set_aside(splits, rules=len(rules.asked))
    new = calibrate(old, splits, method=method, device=device, progress=progress)
    new.origin = old.origin.of_data(splits)
    lost: list[DecisionError] = []
    if rules.asked:
        new, lost = _decided(new, splits, rules, device, progress)
    before = evaluate(old, splits, device=device, progress=progress, stage="before")
    after = evaluate(new, splits, device=device, progress=progress, stage="after")
    plain = uncalibrated(new, splits, device=device, progress=progress)
    recipe = _recipe(bundle, new, splits, method)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        export_onnx(new, file, layout=new.members.layouts[0], recipe_hash=recipe_hash(recipe))
        of_file = evaluate(file, splits, progress=progress, stage="onnx")
        content = file.read_bytes()
    assert new.origin.input_shape is not None
    latency = onnx_milliseconds({"onnx": content}, new.origin.input_shape)["onnx"]
    columns = {"compressed": after, "onnx": of_file}
    report = {
        **bundle.report_json,
        **{name: _costed(column, bundle, name, latency).to_json() for name, column in columns.items()},
        "calibration": calibration_change(plain, after, new.calibrator.name),
        "class_changes": [],
        "recipe": recipe,
        "conventions": _conventions(bundle.report_json, recipe),
        "recalibration": {
            "data": splits.info.name,
            "before": {"calibration": old.calibrator.name, **_figures(before)},
            "after": {"calibration": new.calibrator.name, **_figures(after)},
        },
        "warnings": _warnings(bundle, new, splits, after, lost),
    }
    drawn = {"before": before, "compressed": after} | ({} if plain is None else {"uncalibrated": plain})
    page = render_page(report, table_rows(report), drawn, method_lines(recipe))
    return bundle.recalibrated(new, content, report, page)


def _refuse_other_classes(model: UncertainModel, splits: Splits) -> None:
    known, given = model.origin.labels, splits.info.labels
    if known is None or given is None or tuple(known) == tuple(given):
        return
    raise DataError(
        f"{splits.info.name} has the classes {', '.join(given)}, and the bundle {', '.join(known)}, in this order: "
        "name the class folders as the bundle's classes"
    )


def _recipe(bundle: Bundle, model: UncertainModel, splits: Splits, method: str) -> dict[str, Any]:
    """The old one, with the calibration that holds now and the data that it was fitted on."""
    info = splits.info
    sizes = {p: len(s) for p in ("calibration", "test") if (s := getattr(splits, p)) is not None}
    return {
        **bundle.recipe,
        "calibration": method,
        "calibrator": model.calibrator.name,
        "calibration_choice": model.calibrator.choice,
        "answers": {"score": model.score.name, "ood_score": model.ood_score.name, **model.record},
        "recalibration": {
            "of": recipe_hash(bundle.recipe),
            "data": {
                "name": Path(info.name).name,
                "images": sizes,
                "calibration": info.calibration,
                "mean": None if info.mean is None else list(info.mean),
                "std": None if info.std is None else list(info.std),
                "fingerprint": info.fingerprint,
            },
        },
    }


def _decided(
    model: UncertainModel, splits: Splits, rules: Guarantees, device: str, progress: ProgressCallback
) -> tuple[UncertainModel, list[DecisionError]]:
    """The rules fitted again, with the same promises; those that these images cannot keep are given back."""
    try:
        return fit_rules(model, splits, rules, device=device, progress=progress)
    except DecisionError as error:
        return model, [error]


def _warnings(
    bundle: Bundle, model: UncertainModel, splits: Splits, after: Evaluation, lost: Sequence[DecisionError]
) -> list[str]:
    """What was said before of anything that is not measured again, and what has to be said now."""
    new = [
        f"calibrated again on {splits.info.name}: compressed and onnx are measured on its test split, the other "
        "columns on that of the first run",
        *splits.info.notes,
        *(f"{count} identical images are in both parts of {pair}" for pair, count in identical_images(splits).items()),
        *suspicions(model, splits, after),
    ]
    new += [f"{_LEFT_OUT}{error}" for error in lost]
    new += broken(after.decisions, model.record, len(after.labels))
    return list(dict.fromkeys(_kept(bundle.report_json, after) + new))


def _kept(old: Mapping[str, Any], after: Evaluation) -> list[str]:
    """An older card's warnings that still hold, named as of the first run."""
    texts = old["warnings"]
    if old.get("recalibration") is not None:
        # What an earlier calibration said of its images is of no figure on the new card.
        texts = [text for text in texts if text.startswith((_FIRST_RUN, _LEFT_OUT))]
    said = [text.removeprefix(_FIRST_RUN) for text in texts]
    still = [text for text in said if not of_compressed(text, after.ood)]
    return [text if text.startswith(_LEFT_OUT) else f"{_FIRST_RUN}{text}" for text in still]


def _conventions(old: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, str]:
    """How the new card's figures were measured, and which of them are the first run's."""
    fidelity = old.get("fidelity")
    said = conventions(recipe, fidelity)
    if fidelity is not None and "samples" in old["conventions"]:
        said["samples"] = old["conventions"]["samples"]
    said["latency"] += "; of the dense columns as the first run measured it, not in turns with the others"
    said["first_run"] = (
        "the columns dense, dense_calibrated and control, the comparison of samples, training_seconds, and of the "
        "recipe all but calibration, calibrator, calibration_choice, answers and recalibration"
    )
    return said


def _costed(column: Evaluation, bundle: Bundle, name: str, latency: dict[str, float]) -> Evaluation:
    """The column with the latency of now, and the seconds that training its weights once took."""
    seconds = bundle.report_json[name]["cost"]["training_seconds"]
    return replace(column, cost=replace(column.cost, latency_ms=latency, training_seconds=seconds))


def _figures(column: Evaluation) -> dict[str, Any]:
    return {name: column.metrics[name].to_json() for name in _SHOWN}
