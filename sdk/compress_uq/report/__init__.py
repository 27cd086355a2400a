"""Measuring models and showing them side by side."""

from compress_uq.report.card import ReportCard, Requirement, conventions, markdown, method_lines, table_rows
from compress_uq.report.changes import calibration_change, class_changes, lost_classes, uncalibrated
from compress_uq.report.decisions import DECISIONS, broken
from compress_uq.report.evaluation import Cost, Evaluation, evaluate, onnx_milliseconds
from compress_uq.report.layers import layer_pages
from compress_uq.report.precision import PrecisionCard, compare_precisions
from compress_uq.report.remeasured import Check, compare_column
from compress_uq.report.suspicions import near_chance, of_compressed, suspicions

__all__ = [
    "DECISIONS",
    "Check",
    "Cost",
    "Evaluation",
    "PrecisionCard",
    "ReportCard",
    "Requirement",
    "broken",
    "calibration_change",
    "class_changes",
    "compare_column",
    "compare_precisions",
    "conventions",
    "evaluate",
    "layer_pages",
    "lost_classes",
    "markdown",
    "method_lines",
    "near_chance",
    "of_compressed",
    "onnx_milliseconds",
    "suspicions",
    "table_rows",
    "uncalibrated",
]
