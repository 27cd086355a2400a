"""The folder that a run leaves: a model, its report card and a verified ONNX file, every byte accounted for."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from compress_uq._version import __version__
from compress_uq.errors import ArtifactError, InputError
from compress_uq.export import ExportOptions, ExportResult, TritonOptions, export_onnx, export_triton
from compress_uq.models import Architecture
from compress_uq.report import ReportCard
from compress_uq.report.card import markdown
from compress_uq.stages import Origin
from compress_uq.storage import refuse_existing, replace_directory, sha256
from compress_uq.stored import FORMAT_VERSION, current, describe, describe_fitted, restore, tensors_of
from compress_uq.uncertain import UncertainModel

__all__ = ["Bundle", "verify_files", "recipe_hash"]

FILES = ("model.safetensors", "structure.json", "report.json", "report.md", "report.html", "model.onnx")

_NO_ARCHITECTURE = (
    "this bundle does not name an architecture that is rebuilt on its own: name its package.module:callable again with "
    "--arch (arch=), or pass Bundle.load(path, model=DENSE_MODULE); its ONNX file works without"
)


def recipe_hash(recipe: Mapping[str, Any]) -> str:
    """SHA-256 of a recipe in canonical JSON."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Bundle:
    """A compressed model with everything that belongs to it.

    One that `compress` made holds a `card`; one that was loaded holds only the card's content, `report_json`.
    """

    onnx: bytes
    """The content of model.onnx."""
    report_json: Mapping[str, Any]
    recipe: Mapping[str, Any]
    files: Mapping[str, bytes]
    """The other files of the folder, by name."""
    fingerprint: str | None = None
    """Of the training data."""
    card: ReportCard | None = None
    uncertain: UncertainModel | None = None

    @property
    def model(self) -> UncertainModel:
        """The uncertain model, an ordinary `nn.Module` whose forward gives a `Prediction`.

        Raises:
            ArtifactError: loaded without an architecture to rebuild it from.
        """
        if self.uncertain is None:
            raise ArtifactError(_NO_ARCHITECTURE)
        return self.uncertain

    @property
    def origin(self) -> Origin:
        """What a stage needs to know of the model; see `model`."""
        return self.model.origin

    def architecture(self, arch: str | None = None) -> nn.Module | None:
        """The dense architecture with untrained weights; None where the bundle names none that is built on its own.

        Args:
            arch: names the bundle's own `package.module:callable` again, which allows importing it.
        """
        return _dense(current(json.loads(self.files["structure.json"])), None, arch)

    @property
    def report(self) -> ReportCard | LoadedCard:
        """The report card; `.to_json()` and `.to_markdown()` on any bundle."""
        return self.card if self.card is not None else LoadedCard(self.report_json)

    @classmethod
    def build(
        cls,
        model: UncertainModel,
        dense: nn.Module,
        card: ReportCard,
        onnx: bytes,
        architecture: Architecture | None,
        fingerprint: str | None,
    ) -> Bundle:
        """A bundle from what a run produced."""
        report = card.to_json()
        files = {
            "model.safetensors": tensors_of(model),
            "structure.json": _json(describe(model, dense, architecture)),
            "report.json": _json(report),
            "report.md": card.to_markdown().encode(),
            "report.html": card.to_html().encode(),
        }
        return cls(onnx, report, report["recipe"], files, fingerprint, card, model)

    def recalibrated(self, model: UncertainModel, onnx: bytes, report: Mapping[str, Any], page: str) -> Bundle:
        """The bundle of a model whose members are this one's and whose other parts are not.

        Args:
            model: what `calibrate` made of this bundle's model.
            onnx: its exported file.
            report: content of report.json; page: of report.html.
        """
        structure = current(json.loads(self.files["structure.json"]))
        files = {
            "model.safetensors": tensors_of(model),
            "structure.json": _json({**structure, **describe_fitted(model)}),
            "report.json": _json(report),
            "report.md": markdown(report).encode(),
            "report.html": page.encode(),
        }
        return Bundle(onnx, report, report["recipe"], files, self.fingerprint, None, model)

    @staticmethod
    def refuse_existing(path: str | os.PathLike[str], *, overwrite: bool) -> None:
        """What `save` would refuse, before any work is done for it.

        Raises:
            ArtifactError: `path` exists and `overwrite` is False, or it is not a bundle.
        """
        refuse_existing(Path(path), overwrite=overwrite)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the folder, whole or not at all.

        Raises:
            ArtifactError: `path` exists and `overwrite` is False, it holds something else, or it cannot be written.
        """
        with replace_directory(path, overwrite=overwrite) as folder:
            for name, content in {**self.files, "model.onnx": self.onnx}.items():
                (folder / name).write_bytes(content)
            manifest = {
                "format_version": FORMAT_VERSION,
                "versions": _versions(),
                "sha256": {name: sha256(folder / name) for name in FILES},
                "recipe": self.recipe,
                "recipe_sha256": recipe_hash(self.recipe),
                "seed": self.recipe.get("seed"),
                "data_fingerprint": self.fingerprint,
            }
            (folder / "manifest.json").write_bytes(_json(manifest))
        return Path(path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        model: nn.Module | Callable[[], nn.Module] | None = None,
        arch: str | None = None,
    ) -> Bundle:
        """Read a bundle; every file is checked against its hash, and nothing in it is run.

        Args:
            path: the folder.
            model: the dense module, or a callable that makes it, where the bundle names no architecture.
            arch: names the bundle's `package.module:callable` again, which allows importing it.

        Raises:
            ArtifactError: not a bundle, or a file that is missing or was changed (names it).
        """
        folder = Path(path)
        manifest = verify_files(folder)
        files = {name: (folder / name).read_bytes() for name in FILES}
        structure = current(json.loads(files["structure.json"]))
        dense = _dense(structure, model, arch)
        uncertain = None if dense is None else restore(structure, dense, files["model.safetensors"])
        report = json.loads(files["report.json"])
        onnx = files.pop("model.onnx")
        return cls(onnx, report, manifest["recipe"], files, manifest["data_fingerprint"], None, uncertain)

    def export_onnx(self, path: str | os.PathLike[str], **options: Unpack[ExportOptions]) -> ExportResult:
        """Export again; see `compress_uq.export_onnx`."""
        return export_onnx(self.model, path, recipe_hash=recipe_hash(self.recipe), **options)

    def export_triton(
        self,
        path: str | os.PathLike[str],
        *,
        options: TritonOptions | None = None,
        overwrite: bool = False,
        **form: Unpack[ExportOptions],
    ) -> ExportResult:
        """Put this bundle's file, or one exported again in another form, into a model repository.

        See `compress_uq.export_triton`, and `export_onnx` for the form. Without one it is model.onnx as it stands, and
        no torch model is needed.
        """
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.onnx"
            if form:
                self.export_onnx(file, **form)
            else:
                file.write_bytes(self.onnx)
            return export_triton(file, path, options=options, overwrite=overwrite)


@dataclass(frozen=True)
class LoadedCard:
    """The report card of a loaded bundle: its content, without the answers it was measured on."""

    content: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The content of report.json."""
        return dict(self.content)

    def to_markdown(self) -> str:
        """The card as tables."""
        return markdown(self.content)


def verify_files(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle whose files all match it.

    Raises:
        ArtifactError: not a bundle, of a newer format, or the first file that is missing or does not match.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise ArtifactError(f"{folder} is not a bundle: it has no manifest.json")
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        version, hashes = int(manifest["format_version"]), dict(manifest["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged: {error}") from error
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"{folder} has bundle format {version}, this version reads up to {FORMAT_VERSION}: update compress-uq"
        )
    if recipe_hash(manifest.get("recipe", {})) != manifest.get("recipe_sha256"):
        raise ArtifactError(f"{path}: the recipe does not match its hash; the bundle was changed after it was written")
    for name in FILES:
        if name not in hashes or not (folder / name).is_file():
            raise ArtifactError(f"{folder} lacks {name}")
        if sha256(folder / name) != hashes[name]:
            raise ArtifactError(f"{folder / name} does not match its hash: it was changed after the bundle was written")
    return manifest


def _dense(
    structure: Mapping[str, Any], model: nn.Module | Callable[[], nn.Module] | None, arch: str | None
) -> nn.Module | None:
    if model is not None:
        made = model if isinstance(model, nn.Module) else model()
        if not isinstance(made, nn.Module):
            raise InputError(f"model={model!r}: expected a torch.nn.Module or a callable that makes one")
        return made
    recorded = structure["architecture"]
    if recorded is None:
        return None
    architecture = Architecture.from_json(recorded)
    if architecture.imports_user_code and arch != architecture.reference:
        return None
    return architecture.build()


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1, allow_nan=False).encode()


def _versions() -> dict[str, str]:
    packages = ("torch", "torchvision", "torch-pruning", "onnx", "onnxscript", "safetensors", "numpy")
    return {"compress-uq": __version__, **{name: metadata.version(name) for name in packages}}
