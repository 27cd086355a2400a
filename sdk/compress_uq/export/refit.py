"""Calibrator and decision rules fitted again on the logits of a graph that computes in other numbers."""

from __future__ import annotations

import onnx

from compress_uq.data import Splits, set_aside
from compress_uq.deciding import fit_rules, promised
from compress_uq.export.body import FileMembers
from compress_uq.progress import ProgressCallback, silent
from compress_uq.steps import calibrate
from compress_uq.uncertain import UncertainModel

__all__ = ["refit"]


def refit(
    model: UncertainModel, body: onnx.ModelProto, splits: Splits, *, progress: ProgressCallback = silent
) -> tuple[UncertainModel, tuple[str, ...]]:
    """A copy of a model with the calibrator and the rules that suit the answers of `body`, and the names of what was
    fitted.

    Scores of features keep the training images' features in float32.

    Args:
        model: what it has, it has again: the same calibrator, the same guarantees.
        body: the graph of its members.
        splits: needs `calibration`, as far as there is anything to fit; rules use `decision`, or a part of it.

    Raises:
        DecisionError: a rule cannot be certified on these answers.
        CalibrationError: nothing to fit.
        DataError: no calibration split.
    """
    guarantees = promised(model)
    splits = set_aside(splits, rules=len(guarantees.asked))
    of_file = model.but(members=FileMembers(body.SerializeToString(), model.members))
    fitted: list[str] = []
    if model.calibrator.name != "none":
        of_file = calibrate(of_file, splits, method=model.calibrator.name, progress=progress)
        fitted.append("calibrator")
    if guarantees.asked:
        of_file, errors = fit_rules(of_file, splits, guarantees, progress=progress)
        if errors:
            raise errors[0]
        fitted += guarantees.asked
    parts = {name: getattr(of_file, name) for name in ("calibrator", "acceptance", "sets", "record")}
    return model.but(**parts), tuple(fitted)
