"""Checking an artifact again, long after it was made: its files, its graph, its answers and its report card."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from compress_uq.bundle import Bundle, recipe_hash
from compress_uq.data import Splits
from compress_uq.errors import ArtifactError, GateError, InputError, VerificationError
from compress_uq.export import GATES, GateInput, NotCompared, gate_images, open_graph, run_gate
from compress_uq.progress import ProgressCallback, silent
from compress_uq.report import Check, compare_column, evaluate
from compress_uq.runtime import read_model, survives_loading

__all__ = ["Verification", "verify"]

_NAMED = 5
"""Checks that an error names; all are in `VerificationError.checks`."""


@dataclass(frozen=True)
class Verification:
    """What was looked at, by name, in order; nothing of it is broken."""

    checks: Mapping[str, Check]

    @property
    def compared(self) -> int:
        """How many checks held; the others had nothing to be compared with."""
        return sum(check.held is True for check in self.checks.values())

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {name: vars(check) for name, check in self.checks.items()}


def verify(
    artifact: str | os.PathLike[str] | Bundle,
    *,
    data: Splits | None = None,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    arch: str | None = None,
    progress: ProgressCallback = silent,
) -> Verification:
    """Check that an artifact still keeps its promises.

    Of a bundle: the hash of every file, that its ONNX file belongs to its recipe and has the size that its card says,
    every gate of the export, parity with the torch model where that can be rebuilt, and with `data` every figure in the
    card's column `onnx`, measured again. Of an .onnx file: every gate but parity.

    Args:
        artifact: a bundle's folder, a bundle, or an exported file.
        data: the splits that the card was measured on, for a bundle; needs `test`, and `ood` with the card's sets as
            far as they are to be compared.
        model: the dense module, for a bundle that names no architecture.
        arch: names the bundle's own `package.module:callable` again, to allow importing it.
        progress: called as images are read.

    Raises:
        VerificationError: something does not hold; says what was found and expected, and holds every check.
        ArtifactError: it cannot be read, or a file of the bundle was changed.
        InputError: data for a file that has no card.
    """
    name = "the bundle" if isinstance(artifact, Bundle) else os.fspath(artifact)
    bundle = _bundle(artifact, model, arch)
    if bundle is None and data is not None:
        raise InputError(f"{name} has no report card beside it: give its bundle, or measure it with evaluate")
    content = read_model(name) if bundle is None else bundle.onnx
    try:
        given = open_graph(content, None if bundle is None else bundle.uncertain)
    except ArtifactError as error:
        raise ArtifactError(f"{name}: {error}") from error
    read = bundle is not None and bundle is not artifact
    checks = {"hashes": Check("every file matches the manifest", True)} if read else {}
    if bundle is not None:
        checks |= _belongs(bundle, given)
    if bundle is not None and data is not None:
        images = gate_images(data.require("test", "the report card"), given.recorded["input"])
        checks |= _same_data(bundle, data)
        given = replace(given, images=images if checks["data"].held else None)
    checks |= _gates(given)
    if bundle is not None:
        checks |= _card(bundle, given, data, progress, sound=_sound(checks))
    if not _sound(checks):
        raise VerificationError(f"{name}: {_told(checks)}", checks)
    return Verification(checks)


def _bundle(
    artifact: str | os.PathLike[str] | Bundle, model: nn.Module | Callable[[], nn.Module] | None, arch: str | None
) -> Bundle | None:
    """The bundle, read and its hashes checked where it is a folder; None for a file."""
    if isinstance(artifact, Bundle):
        return artifact
    if Path(artifact).is_dir():
        return Bundle.load(artifact, model=model, arch=arch)
    if not Path(artifact).exists():
        raise ArtifactError(f"{artifact}: no such bundle or file")
    return None


def _sound(checks: Mapping[str, Check]) -> bool:
    return all(check.held is not False for check in checks.values())


def _told(checks: Mapping[str, Check]) -> str:
    broken = [f"{name}: {check.found}" for name, check in checks.items() if check.held is False]
    more = len(broken) - _NAMED
    return "; ".join(broken[:_NAMED]) + (f"; and {more} more" if more > 0 else "")


def _belongs(bundle: Bundle, given: GateInput) -> dict[str, Check]:
    """Whether model.onnx is the file that the rest of the bundle tells of."""
    of_file, of_bundle = given.recorded.get("recipe_sha256"), recipe_hash(bundle.recipe)
    size, told = len(bundle.onnx), bundle.report_json["onnx"]["cost"]["size_bytes"]
    return {
        "recipe": Check(
            f"model.onnx is of recipe {str(of_file)[:12]}, expected {of_bundle[:12]}", of_file == of_bundle
        ),
        "size": Check(f"model.onnx has {size} bytes, expected {told} (report.json)", size == told),
    }


def _gates(given: GateInput) -> dict[str, Check]:
    """Every gate; those behind one that fails have nothing to stand on."""
    checks: dict[str, Check] = {}
    failed: str | None = None
    for gate in GATES:
        if failed is not None:
            checks[gate] = Check(f"not compared: {failed!r} failed", None)
            continue
        try:
            if gate == "loads" and not survives_loading(given.content):
                raise GateError("gate 'loads': onnxruntime crashes on the graph on this machine")
            found = run_gate(gate, given)
        except GateError as error:
            failed = gate
            checks[gate] = Check(str(error), False)
        else:
            checks[gate] = Check(found, None if isinstance(found, NotCompared) else True)
    return checks


def _card(
    bundle: Bundle, given: GateInput, data: Splits | None, progress: ProgressCallback, *, sound: bool
) -> dict[str, Check]:
    """The column `onnx`, measured again."""
    if data is None:
        return {"card": Check("not compared: no data were given; --data (data=) measures it again", None)}
    if not sound:
        return {"card": Check("not compared: what it stands on does not hold", None)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        file.write_bytes(bundle.onnx)
        measured = evaluate(file, data, progress=progress, stage="the card again")
    rules = {name: _on_arrays(rule) for name, rule in given.rules.items()}
    precision = given.recorded.get("precision", "fp32")
    return compare_column(bundle.report_json["onnx"], measured, precision, rules)


def _same_data(bundle: Bundle, data: Splits) -> dict[str, Check]:
    """Whether these are the images that the card was measured on, as far as the recipe tells."""
    again = bundle.recipe.get("recalibration")
    told = bundle.recipe["data"] if again is None else again["data"]
    fingerprint = bundle.fingerprint if again is None else told["fingerprint"]
    wanted, got = told["images"]["test"], len(data.require("test", "the report card"))  # type: ignore[arg-type]
    if got != wanted:
        return {"data": Check(f"{got} test images, expected {wanted} of {told['name']}", False)}
    if None not in (fingerprint, data.info.fingerprint) and fingerprint != data.info.fingerprint:
        return {"data": Check(f"fingerprint {data.info.fingerprint}, expected {fingerprint} of {told['name']}", False)}
    return {"data": Check(f"{got} test images", True)}


def _on_arrays(rule: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda values: rule(torch.from_numpy(values)).numpy()
