"""Measuring models and showing them side by side."""

from compress_uq.report.card import ReportCard, Requirement, markdown, table_rows
from compress_uq.report.changes import class_changes, lost_classes
from compress_uq.report.decisions import DECISIONS, broken
from compress_uq.report.evaluation import Cost, Evaluation, evaluate, onnx_milliseconds
from compress_uq.report.layers import layer_pages
from compress_uq.report.precision import PrecisionCard, compare_precisions
from compress_uq.report.remeasured import Check, compare_column
from compress_uq.report.suspicions import near_chance, suspicions

__all__ = [
    "DECISIONS",
    "Check",
    "Cost",
    "Evaluation",
    "PrecisionCard",
    "ReportCard",
    "Requirement",
    "broken",
    "class_changes",
    "compare_column",
    "compare_precisions",
    "evaluate",
    "layer_pages",
    "lost_classes",
    "markdown",
    "near_chance",
    "onnx_milliseconds",
    "suspicions",
    "table_rows",
]
