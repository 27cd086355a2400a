"""compress-uq: prune a trained classifier and ship it with calibrated uncertainty in one ONNX file.

Names are loaded when they are first used, so that `compress_uq.runtime` needs neither torch nor the rest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from compress_uq._version import __version__

if TYPE_CHECKING:
    from compress_uq import (
        calibration,
        data,
        decisions,
        errors,
        measuring,
        metrics,
        models,
        pipeline,
        pruning,
        report,
        runtime,
        scores,
        study,
        uq,
    )
    from compress_uq.bundle import Bundle, verify_files
    from compress_uq.choosing import choose_scores
    from compress_uq.config import TrainingConfig, from_toml, to_toml
    from compress_uq.data import DataInfo, Splits, hold_out, load_splits, set_aside
    from compress_uq.deciding import decide
    from compress_uq.errors import CompressUQError, InputError
    from compress_uq.export import TritonOptions, export_onnx, export_triton, layout_costs
    from compress_uq.inputs import (
        configure_method,
        initial_model,
        load_recorded_data,
        open_model_and_data,
        train_dense,
    )
    from compress_uq.layer_sensitivity import Sensitivity, sensitivity
    from compress_uq.listing import catalogue
    from compress_uq.measuring import Benchmark, benchmark
    from compress_uq.models import Architecture, build_model, load_model, read_checkpoint, save_model
    from compress_uq.pipeline import compress
    from compress_uq.planning import CompressionPlan, plan_compression
    from compress_uq.progress import Progress
    from compress_uq.pruning import mask_weights, prune, remove_masks
    from compress_uq.recalibration import load_new_data, recalibrate
    from compress_uq.report import Evaluation, ReportCard, Requirement, compare_precisions, evaluate
    from compress_uq.runtime import OnnxPredictor
    from compress_uq.search import Budget, SearchResult, search_sparsity
    from compress_uq.steps import calibrate, finetune, fit_uncertainty, prepare_uncertainty
    from compress_uq.study import Study, StudyResult, plan_study, read_study, run_study
    from compress_uq.types import Prediction
    from compress_uq.uncertain import UncertainModel
    from compress_uq.verification import Verification, verify

_HOME = {
    "Architecture": "models",
    "Benchmark": "measuring",
    "Budget": "search",
    "Bundle": "bundle",
    "CompressUQError": "errors",
    "CompressionPlan": "planning",
    "DataInfo": "data",
    "Evaluation": "report",
    "InputError": "errors",
    "OnnxPredictor": "runtime",
    "Prediction": "types",
    "Progress": "progress",
    "ReportCard": "report",
    "Requirement": "report",
    "SearchResult": "search",
    "Sensitivity": "layer_sensitivity",
    "Splits": "data",
    "Study": "study",
    "StudyResult": "study",
    "TrainingConfig": "config",
    "TritonOptions": "export",
    "UncertainModel": "uncertain",
    "Verification": "verification",
    "benchmark": "measuring",
    "build_model": "models",
    "calibrate": "steps",
    "catalogue": "listing",
    "choose_scores": "choosing",
    "compare_precisions": "report",
    "compress": "pipeline",
    "configure_method": "inputs",
    "decide": "deciding",
    "evaluate": "report",
    "export_onnx": "export",
    "export_triton": "export",
    "finetune": "steps",
    "fit_uncertainty": "steps",
    "from_toml": "config",
    "hold_out": "data",
    "initial_model": "inputs",
    "layout_costs": "export",
    "load_model": "models",
    "load_new_data": "recalibration",
    "load_recorded_data": "inputs",
    "load_splits": "data",
    "mask_weights": "pruning",
    "open_model_and_data": "inputs",
    "plan_compression": "planning",
    "plan_study": "study",
    "prepare_uncertainty": "steps",
    "prune": "pruning",
    "read_checkpoint": "models",
    "read_study": "study",
    "recalibrate": "recalibration",
    "remove_masks": "pruning",
    "run_study": "study",
    "save_model": "models",
    "search_sparsity": "search",
    "sensitivity": "layer_sensitivity",
    "set_aside": "data",
    "to_toml": "config",
    "train_dense": "inputs",
    "verify": "verification",
    "verify_files": "bundle",
}
_MODULES = (
    "calibration",
    "data",
    "decisions",
    "errors",
    "measuring",
    "metrics",
    "models",
    "pipeline",
    "pruning",
    "report",
    "runtime",
    "scores",
    "study",
    "uq",
)

__all__ = [
    "Architecture",
    "Benchmark",
    "Budget",
    "Bundle",
    "CompressUQError",
    "CompressionPlan",
    "DataInfo",
    "Evaluation",
    "InputError",
    "OnnxPredictor",
    "Prediction",
    "Progress",
    "ReportCard",
    "Requirement",
    "SearchResult",
    "Sensitivity",
    "Splits",
    "Study",
    "StudyResult",
    "TrainingConfig",
    "TritonOptions",
    "UncertainModel",
    "Verification",
    "__version__",
    "benchmark",
    "build_model",
    "calibrate",
    "calibration",
    "catalogue",
    "choose_scores",
    "compare_precisions",
    "compress",
    "configure_method",
    "data",
    "decide",
    "decisions",
    "errors",
    "evaluate",
    "export_onnx",
    "export_triton",
    "finetune",
    "fit_uncertainty",
    "from_toml",
    "hold_out",
    "initial_model",
    "layout_costs",
    "load_model",
    "load_new_data",
    "load_recorded_data",
    "load_splits",
    "mask_weights",
    "measuring",
    "metrics",
    "models",
    "open_model_and_data",
    "pipeline",
    "plan_compression",
    "plan_study",
    "prepare_uncertainty",
    "prune",
    "pruning",
    "read_checkpoint",
    "read_study",
    "recalibrate",
    "remove_masks",
    "report",
    "run_study",
    "runtime",
    "save_model",
    "scores",
    "search_sparsity",
    "sensitivity",
    "set_aside",
    "study",
    "to_toml",
    "train_dense",
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
