"""compress-uq: prune a trained classifier and ship it with calibrated uncertainty in one ONNX file.

Names are loaded when they are first used, so that `compress_uq.runtime` needs neither torch nor the rest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from compress_uq._version import __version__

if TYPE_CHECKING:
    from compress_uq import calibration, data, errors, metrics, models, pipeline, pruning, report, runtime, uq
    from compress_uq.bundle import Bundle, verify_files
    from compress_uq.catalogue import catalogue
    from compress_uq.config import TrainingConfig, from_toml, to_toml
    from compress_uq.data import DataInfo, Splits, hold_out, load_splits
    from compress_uq.errors import CompressUQError, InputError
    from compress_uq.export import export_onnx
    from compress_uq.models import Architecture, build_model, load_model, read_checkpoint, save_model
    from compress_uq.pipeline import compress, plan_compression
    from compress_uq.progress import Progress
    from compress_uq.pruning import prune
    from compress_uq.report import Evaluation, ReportCard, Requirement, evaluate
    from compress_uq.runtime import OnnxPredictor
    from compress_uq.steps import calibrate, finetune, fit_uncertainty, prepare_uncertainty
    from compress_uq.types import Prediction
    from compress_uq.uncertain import UncertainModel
    from compress_uq.verification import verify

_HOME = {
    "Architecture": "models",
    "Bundle": "bundle",
    "CompressUQError": "errors",
    "DataInfo": "data",
    "Evaluation": "report",
    "InputError": "errors",
    "OnnxPredictor": "runtime",
    "Prediction": "types",
    "Progress": "progress",
    "ReportCard": "report",
    "Requirement": "report",
    "Splits": "data",
    "TrainingConfig": "config",
    "UncertainModel": "uncertain",
    "build_model": "models",
    "calibrate": "steps",
    "catalogue": "catalogue",
    "compress": "pipeline",
    "evaluate": "report",
    "export_onnx": "export",
    "finetune": "steps",
    "fit_uncertainty": "steps",
    "from_toml": "config",
    "hold_out": "data",
    "load_model": "models",
    "load_splits": "data",
    "plan_compression": "pipeline",
    "prepare_uncertainty": "steps",
    "prune": "pruning",
    "read_checkpoint": "models",
    "save_model": "models",
    "to_toml": "config",
    "verify": "verification",
    "verify_files": "bundle",
}
_MODULES = ("calibration", "data", "errors", "metrics", "models", "pipeline", "pruning", "report", "runtime", "uq")

__all__ = [
    "Architecture",
    "Bundle",
    "CompressUQError",
    "DataInfo",
    "Evaluation",
    "InputError",
    "OnnxPredictor",
    "Prediction",
    "Progress",
    "ReportCard",
    "Requirement",
    "Splits",
    "TrainingConfig",
    "UncertainModel",
    "__version__",
    "build_model",
    "calibrate",
    "calibration",
    "catalogue",
    "compress",
    "data",
    "errors",
    "evaluate",
    "export_onnx",
    "finetune",
    "fit_uncertainty",
    "from_toml",
    "hold_out",
    "load_model",
    "load_splits",
    "metrics",
    "models",
    "pipeline",
    "plan_compression",
    "prepare_uncertainty",
    "prune",
    "pruning",
    "read_checkpoint",
    "report",
    "runtime",
    "save_model",
    "to_toml",
    "uq",
    "verify",
    "verify_files",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"compress_uq.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"compress_uq.{name}")
    else:
        raise AttributeError(f"module 'compress_uq' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
