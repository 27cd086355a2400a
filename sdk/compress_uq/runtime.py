"""Running an exported file: onnxruntime and numpy, nothing else. This is what a server copies."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from compress_uq.errors import ArtifactError, InputError, MissingDependencyError
from compress_uq.types import OUTPUT_NAMES, Prediction

try:
    import onnxruntime
except ImportError as _error:
    raise MissingDependencyError("onnxruntime is missing: pip install onnxruntime-gpu (or onnxruntime)") from _error

__all__ = ["OnnxPredictor", "available_providers", "quantisation_tools", "read_model", "session", "survives_loading"]

METADATA_PREFIX = "compress_uq."
_CPU = "CPUExecutionProvider"
_LARGEST = 2**31

_FAR = 10
"""Normalised images may be brighter than any pixel, as noise is; pixels from 0 to 255 are further off than that."""


def session(
    model: str | bytes,
    *,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    optimise: bool = True,
    fallback: bool = True,
) -> Any:
    """An onnxruntime session; with `threads` its pool does not spin while it waits.

    Without `fallback` nothing is left to the CPU that another provider was asked to do: onnxruntime does so in silence.

    Raises:
        MissingDependencyError: two onnxruntime packages clash, a provider is not there, or, without `fallback`, it
            falls back to the CPU.
    """
    available = onnxruntime.get_available_providers()
    _refuse_clash(available)
    wanted = list(providers or [_CPU])
    for provider in wanted:
        if provider not in available:
            raise MissingDependencyError(f"provider {provider!r} is not there: onnxruntime has {', '.join(available)}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    strict = not fallback and wanted[0] != _CPU
    if strict:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        made = onnxruntime.InferenceSession(model, options, providers=wanted, enable_fallback=int(not strict))
    except Exception as error:  # onnxruntime's errors have no common type
        if strict and "fallback to CPU EP has been explicitly disabled" in str(error):
            raise MissingDependencyError(f"{wanted[0]} leaves the graph, or a part of it, to the CPU") from error
        raise
    if strict and made.get_providers()[0] != wanted[0]:
        raise MissingDependencyError(f"{wanted[0]} does not start on this machine: onnxruntime fell back to the CPU")
    idle = set(wanted) - set(made.get_providers())
    if idle and _CPU not in wanted:
        raise MissingDependencyError(
            f"provider {min(idle)!r} is installed and does not start on this machine: check its device, driver and "
            "libraries, or do without it"
        )
    return made


def available_providers() -> list[str]:
    """The execution providers that this onnxruntime was built with, whether or not the machine can run them."""
    return list(onnxruntime.get_available_providers())


def read_model(path: str | os.PathLike[str]) -> bytes:
    """The content of an .onnx file.

    Raises:
        ArtifactError: no such file, larger than one ONNX file can be, or not readable.
    """
    file = Path(path)
    if not file.is_file():
        raise ArtifactError(f"{path}: no such file" + (", but a folder" if file.is_dir() else ""))
    size = file.stat().st_size
    if size >= _LARGEST:
        raise ArtifactError(f"{path} has {size / 1e9:.1f} GB: one ONNX file holds under 2 GB; prune more")
    try:
        return file.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error


def survives_loading(content: bytes) -> bool:
    """False where onnxruntime, instead of raising, ends the process that loads a graph; tried in another process."""
    code = "import sys; from compress_uq.runtime import session; session(sys.stdin.buffer.read())"
    return subprocess.run([sys.executable, "-c", code], input=content, capture_output=True, check=False).returncode >= 0


def quantisation_tools() -> Any:
    """onnxruntime's quantiser, which needs the package onnx besides."""
    return importlib.import_module("onnxruntime.quantization")


class OnnxPredictor:
    """An exported model as a function of numpy arrays; safe to call from several threads.

    Args:
        path: the `.onnx` file.
        providers: onnxruntime execution providers; the CPU by default.
        threads: threads inside one call; onnxruntime's choice by default.

    Raises:
        ArtifactError: no such file, not ONNX, or not exported by compress-uq.
        MissingDependencyError: a provider that is not there, or does not start and the CPU was not named beside it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
    ) -> None:
        self.path = Path(path)
        content = read_model(path)
        try:
            self._session = session(content, providers=providers, threads=threads)
        except (MissingDependencyError, InputError):
            raise
        except Exception as error:  # onnxruntime's errors have no common type
            reason = str(error).strip().splitlines()[0]
            raise ArtifactError(f"{self.path} is not an ONNX file that onnxruntime can load: {reason}") from error
        names = tuple(output.name for output in self._session.get_outputs())
        if names[: len(OUTPUT_NAMES)] != OUTPUT_NAMES:
            raise ArtifactError(f"{self.path} was not exported by compress-uq: its outputs are {', '.join(names)}")
        self._outputs = names
        inputs = [i.name for i in self._session.get_inputs()]
        if inputs not in (["images"], ["images", "seed"]):
            raise ArtifactError(f"{self.path} was not exported by compress-uq: its inputs are {', '.join(inputs)}")
        self.seeded = len(inputs) == 2
        first = self._session.get_inputs()[0]
        self.input_shape: tuple[int, ...] = tuple(first.shape[1:])
        """Of one image as it is fed: (C, H, W), and (H, W, C) for a file that takes pixels."""
        self.takes_pixels = first.type == "tensor(uint8)"
        self.metadata: Mapping[str, Any] = self._recorded()
        """What the exporter recorded: labels, normalisation, method, sampling, versions."""
        self._brightest = self._limit()

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of one image as it is fed."""
        return (self.input_shape[-1], *self.input_shape[:-1]) if self.takes_pixels else self.input_shape

    def __call__(self, images: np.ndarray, seed: np.ndarray | Sequence[int] | None = None) -> Prediction:
        """Images to a `Prediction` of arrays.

        Args:
            images: (N, C, H, W) float32, normalised; for a file exported with `input="uint8-nhwc"` (N, H, W, C) uint8.
            seed: (N,) int64, for a file exported with `sampling="seeded"` and only for it.

        Raises:
            InputError: no image, another shape or dtype, NaN, pixels where normalised images are expected, or a seed
                that is missing or not wanted.
            ArtifactError: onnxruntime cannot run the file on them.
        """
        try:
            array = np.asarray(images)
        except ValueError as error:
            raise InputError(f"images are no array: {error}") from error
        if array.ndim != 1 + len(self.input_shape) or array.shape[1:] != self.input_shape:
            raise InputError(f"images of shape {array.shape}: expected (N, {', '.join(map(str, self.input_shape))})")
        if not len(array):
            raise InputError("no image was given: expected one or more")
        feed = {"images": self._pixels(array) if self.takes_pixels else self._normalised(array)}
        if self.seeded != (seed is not None):
            wanted = "a seed per image: pass seed, int64 of shape (N,)" if self.seeded else "no seed: leave it out"
            raise InputError(f"{self.path.name} takes {wanted}")
        if seed is not None:
            feed["seed"] = _seeds(seed, len(array))
        try:
            found = self._session.run(None, feed)
        except Exception as error:  # onnxruntime's errors have no common type
            reason = str(error).strip().splitlines()[0]
            raise ArtifactError(f"{self.path} cannot be run on {len(array)} images: {reason}") from error
        answers = dict(zip(self._outputs, found, strict=True))
        return Prediction(**{name: answers.get(name) for name in Prediction._fields})

    def _pixels(self, array: np.ndarray) -> np.ndarray:
        if array.dtype != np.uint8:
            raise InputError(f"images of dtype {array.dtype}: {self.path.name} takes pixels, uint8 from 0 to 255")
        return np.ascontiguousarray(array)

    def _normalised(self, array: np.ndarray) -> np.ndarray:
        if array.dtype.kind != "f":
            raise InputError(f"images of dtype {array.dtype}: expected float32, normalised as in `metadata`")
        if not np.isfinite(array).all():
            raise InputError("images hold NaN or infinite values")
        largest = max(float(array.max()), -float(array.min()))
        if largest > self._brightest:
            raise InputError(
                f"images reach {largest:.4g}: expected them normalised as in `metadata`, (pixel / 255 - mean) / std, "
                f"which is within {self._brightest / _FAR:.3g}"
            )
        return np.ascontiguousarray(array, dtype=np.float32)

    def _recorded(self) -> dict[str, Any]:
        """The metadata that are ours, without their prefix."""
        found = self._session.get_modelmeta().custom_metadata_map
        ours = {key.removeprefix(METADATA_PREFIX): value for key, value in found.items() if METADATA_PREFIX in key}
        missing = sorted({"input", "labels", "sampling"} - set(ours))
        if missing:
            raise ArtifactError(
                f"{self.path} was not exported by compress-uq, or was edited: its metadata lack {', '.join(missing)}"
            )
        try:
            return {key: json.loads(value) for key, value in ours.items()}
        except ValueError as error:
            raise ArtifactError(f"the metadata of {self.path} are damaged: {error}") from error

    def _limit(self) -> float:
        """What no normalised image comes near; infinite where the normalisation is not known."""
        recorded = self.metadata["input"]
        mean, std = recorded.get("mean"), recorded.get("std")
        if mean is None or std is None:
            return float("inf")
        return _FAR * float(np.max(np.abs([(np.subtract(v, mean)) / np.asarray(std) for v in (0.0, 1.0)])))


def _seeds(given: np.ndarray | Sequence[int], count: int) -> np.ndarray:
    """One whole number per image (N,) int64."""
    seeds = np.asarray(given)
    if seeds.dtype.kind not in "iu":
        raise InputError(f"seed of dtype {seeds.dtype}: expected int64")
    if seeds.shape != (count,):
        raise InputError(f"seed of shape {seeds.shape}: expected ({count},), one per image")
    return seeds.astype(np.int64)


def _refuse_clash(available: Sequence[str]) -> None:
    """The CPU package installed over the GPU one takes its files and leaves neither whole."""
    installed = {name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)}
    if len(installed) == 2 and "CUDAExecutionProvider" not in available:
        raise MissingDependencyError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install onnxruntime-gpu"
        )


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
