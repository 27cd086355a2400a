"""ONNX files: written, gated, and only then kept."""

from compress_uq.export.costs import CostTable, LayoutCost
from compress_uq.export.feeds import gate_images
from compress_uq.export.gates import GATES, GateInput, NotCompared, check_graph, open_graph, run_gate
from compress_uq.export.integer import SCHEMES
from compress_uq.export.layouts import LAYOUTS
from compress_uq.export.member_layouts import MEMBER_LAYOUTS
from compress_uq.export.onnx_file import ExportOptions, ExportResult, export_onnx, layout_costs
from compress_uq.export.parts import Parts, split_model
from compress_uq.export.precisions import PRECISIONS
from compress_uq.export.triton import TritonOptions, export_triton
from compress_uq.registry import Entry, Registry

__all__ = [
    "EXPORTERS",
    "GATES",
    "LAYOUTS",
    "MEMBER_LAYOUTS",
    "PRECISIONS",
    "SCHEMES",
    "CostTable",
    "ExportOptions",
    "ExportResult",
    "GateInput",
    "LayoutCost",
    "NotCompared",
    "Parts",
    "TritonOptions",
    "check_graph",
    "export_onnx",
    "export_triton",
    "gate_images",
    "layout_costs",
    "open_graph",
    "run_gate",
    "split_model",
]

EXPORTERS: Registry[str] = Registry(
    "exporter",
    Entry("onnx", "one ONNX file at opset 18 in fp32, fp16 or int8, samples folded or unrolled", "", "onnx"),
    Entry("triton", "a model repository for Triton Inference Server", "", "triton"),
)
