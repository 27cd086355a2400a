"""Model files: compress-uq checkpoints, state dicts and, when asked for, whole pickled modules."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from compress_uq.errors import ModelError
from compress_uq.models.architectures import Architecture, import_from_here
from compress_uq.models.weights import fit_weights, refuse_non_finite
from compress_uq.storage import write_bytes

__all__ = [
    "Checkpoint",
    "DataRecord",
    "ModelFile",
    "load_model",
    "open_model_file",
    "read_checkpoint",
    "save_model",
]

_FORMAT = "compress-uq-checkpoint"
_FORMAT_VERSION = 2
_OF_ONE_MODEL = 1
"""Version of a file with a single model, which older releases read."""


@dataclass(frozen=True)
class DataRecord:
    """What a checkpoint remembers of the data it was trained on."""

    name: str
    fingerprint: str
    held_out: tuple[int, ...] = ()
    """Indices into the training set that no step of training saw: the calibration split."""


@dataclass(frozen=True)
class Checkpoint:
    """Models and what is known about them; whatever their file does not record is None."""

    models: tuple[nn.Module, ...]
    """One, or the members of an ensemble."""
    architecture: Architecture | None = None
    input_shape: tuple[int, ...] | None = None
    labels: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    data: DataRecord | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        """The only model.

        Raises:
            ModelError: there are several.
        """
        if len(self.models) != 1:
            raise ModelError(
                f"the file holds {len(self.models)} models, the members of an ensemble, and one is expected: "
                "read_checkpoint(path).models has them all"
            )
        return self.models[0]


@dataclass(frozen=True)
class ModelFile:
    """A model file that was read but not yet built: its header, and state dicts or a whole module."""

    path: Path
    header: Mapping[str, Any]
    states: tuple[Mapping[str, Tensor], ...]
    """One for each model."""
    module: nn.Module | None

    @property
    def data(self) -> DataRecord | None:
        """The recorded training data, if any."""
        record = self.header.get("data")
        if record is None:
            return None
        return DataRecord(record["name"], record["fingerprint"], tuple(record["held_out"].tolist()))

    @property
    def architecture(self) -> Architecture | None:
        """The recorded architecture, if any."""
        recorded = self.header.get("architecture")
        return None if recorded is None else Architecture.from_json(recorded)

    def recorded(self, key: str) -> tuple[Any, ...] | None:
        """A recorded sequence such as `labels`, `mean`, `std` or `input_shape`."""
        value = self.header.get(key)
        return None if value is None else tuple(value)

    def build(
        self,
        *,
        arch: str | None = None,
        num_classes: int | None = None,
        input_shape: tuple[int, ...] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Checkpoint:
        """The models with their weights in them, in eval mode.

        Raises:
            ModelError: no architecture is known, the weights do not fit it, or they are not finite.
        """
        recorded = self.architecture
        reference: Architecture | None
        if recorded is not None and arch == recorded.reference and not options:
            reference = recorded
        elif arch is not None:
            reference = Architecture(arch, num_classes or self._classes(), input_shape, options or {})
        elif recorded is not None and recorded.imports_user_code:
            raise ModelError(
                f"{self.path} names the architecture {recorded.reference!r}, which is not imported on its own: "
                f"pass --arch {recorded.reference} if you trust it"
            )
        else:
            reference = recorded
        if self.module is not None:
            models = [self.module]
        elif reference is None:
            raise ModelError(
                f"{self.path} holds weights without an architecture: pass --arch, "
                "such as torchvision:resnet18 or package.module:callable"
            )
        else:
            models = [reference.build() for _ in self.states]
            for model, state in zip(models, self.states, strict=True):
                fit_weights(model, state, self.path, reference.reference)
        for model in models:
            refuse_non_finite(model, self.path)
        return Checkpoint(
            tuple(model.eval() for model in models),
            reference,
            self.recorded("input_shape") or input_shape,
            self.recorded("labels"),
            self.recorded("mean"),
            self.recorded("std"),
            self.data,
            self.header.get("training", {}),
        )

    def _classes(self) -> int:
        """Class count of a state dict: the rows of its last matrix."""
        matrices = [v for v in (self.states[0] if self.states else {}).values() if v.ndim >= 2]
        if not matrices:
            raise ModelError(f"{self.path}: the number of classes is not recorded: pass --num-classes")
        return int(matrices[-1].shape[0])


def open_model_file(path: str | os.PathLike[str], *, unsafe: bool = False) -> ModelFile:
    """Read a model file without running any code in it, unless `unsafe`.

    Raises:
        ModelError: missing, not a model file, or a whole pickled module and `unsafe` is False.
    """
    file = Path(path)
    if unsafe:
        import_from_here()
    if not file.is_file():
        raise ModelError(f"{file}: no such file")
    if file.suffix == ".safetensors":
        try:
            return ModelFile(file, {}, (load_file(file),), None)
        except SafetensorError as error:
            raise ModelError(f"{file} is not a safetensors file: {error}") from error
    content = _unpickle(file, unsafe=unsafe)
    if isinstance(content, nn.Module):
        return ModelFile(file, {}, (), content)
    if not isinstance(content, Mapping):
        raise ModelError(f"{file} holds a {type(content).__name__}: expected a checkpoint or a state dict")
    if content.get("format") == _FORMAT:
        if content["format_version"] > _FORMAT_VERSION:
            raise ModelError(
                f"{file} has checkpoint format {content['format_version']}, this version reads up to "
                f"{_FORMAT_VERSION}: update compress-uq"
            )
        several = content.get("state_dicts")
        return ModelFile(file, content, (content["state_dict"],) if several is None else tuple(several), None)
    return ModelFile(file, {}, (_state_dict(content, file),), None)


def read_checkpoint(
    path: str | os.PathLike[str],
    *,
    arch: str | None = None,
    num_classes: int | None = None,
    input_shape: tuple[int, ...] | None = None,
    options: Mapping[str, Any] | None = None,
    unsafe: bool = False,
) -> Checkpoint:
    """Read a model file and build its models; see `open_model_file` and `ModelFile.build`."""
    opened = open_model_file(path, unsafe=unsafe)
    return opened.build(arch=arch, num_classes=num_classes, input_shape=input_shape, options=options)


def load_model(
    path: str | os.PathLike[str],
    *,
    arch: str | None = None,
    num_classes: int | None = None,
    input_shape: tuple[int, ...] | None = None,
    options: Mapping[str, Any] | None = None,
    unsafe: bool = False,
) -> nn.Module:
    """The model of a model file, in eval mode; `read_checkpoint` also tells what the file records.

    Raises:
        ModelError: whatever does not fit, or a file with several members, which `read_checkpoint` reads.
    """
    return read_checkpoint(
        path, arch=arch, num_classes=num_classes, input_shape=input_shape, options=options, unsafe=unsafe
    ).model


def save_model(
    model: nn.Module | Sequence[nn.Module],
    path: str | os.PathLike[str],
    *,
    arch: str | Architecture,
    num_classes: int | None = None,
    input_shape: Sequence[int] | None = None,
    options: Mapping[str, Any] | None = None,
    labels: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    data: DataRecord | None = None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write a compress-uq checkpoint: tensors and plain values, readable without running code.

    Several models of one architecture, the members of an ensemble, are one checkpoint.

    Raises:
        ModelError: `arch` is a name and `num_classes` is missing, or it does not fit the model.
        ArtifactError: the file cannot be written.
    """
    if isinstance(arch, str):
        if num_classes is None:
            raise ModelError(f"save_model(arch={arch!r}) needs num_classes=")
        shape = None if input_shape is None else tuple(input_shape)
        arch = Architecture(arch, num_classes, shape, options or {})
    models = list(model) if isinstance(model, Sequence) else [model]
    if not models:
        raise ModelError(f"{path}: no model was given")
    states = [{k: v.detach().cpu().contiguous() for k, v in one.state_dict().items()} for one in models]
    for state in states:
        fit_weights(arch.build(), state, Path(path), arch.reference)
    header: dict[str, Any] = {
        "format": _FORMAT,
        "format_version": _OF_ONE_MODEL if len(states) == 1 else _FORMAT_VERSION,
        "architecture": arch.to_json(),
        "input_shape": list(arch.input_shape or input_shape or ()) or None,
        "labels": None if labels is None else list(labels),
        "mean": None if mean is None else list(mean),
        "std": None if std is None else list(std),
        "data": None,
        "training": dict(training or {}),
        **({"state_dict": states[0]} if len(states) == 1 else {"state_dicts": states}),
    }
    if data is not None:
        header["data"] = {
            "name": data.name,
            "fingerprint": data.fingerprint,
            "held_out": torch.tensor(data.held_out, dtype=torch.int64),
        }
    buffer = io.BytesIO()
    torch.save(header, buffer)
    write_bytes(path, buffer.getvalue())


def _unpickle(file: Path, *, unsafe: bool) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=not unsafe)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error).lower() and "weights only" not in str(error).lower():
            raise ModelError(f"{file} is not a model file that torch can read") from error
        raise ModelError(
            f"{file} is a whole pickled object, and loading it can run code: pass --unsafe-load (unsafe=True) "
            "if you trust it, or give a state dict with --arch"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, ImportError, AttributeError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{file} is not a model file that torch can read: {reason}") from error


def _state_dict(content: Mapping[str, Any], file: Path) -> dict[str, Tensor]:
    """The tensors by name, out of the wrappings that training scripts put around them."""
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    state = {k: v for k, v in content.items() if isinstance(v, Tensor)}
    if not state:
        raise ModelError(f"{file} holds no tensors under its top level, `state_dict` or `model`: expected a state dict")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state
