"""ONNX files: written, gated, and only then kept."""

from compress_uq.export.feeds import gate_images
from compress_uq.export.gates import GATES, GateInput, NotCompared, check_graph, open_graph, run_gate
from compress_uq.export.onnx_file import ExportResult, export_onnx
from compress_uq.export.triton import TritonOptions, export_triton
from compress_uq.registry import Entry, Registry

__all__ = [
    "EXPORTERS",
    "GATES",
    "ExportResult",
    "GateInput",
    "NotCompared",
    "TritonOptions",
    "check_graph",
    "export_onnx",
    "export_triton",
    "gate_images",
    "open_graph",
    "run_gate",
]

EXPORTERS: Registry[str] = Registry(
    "exporter",
    Entry("onnx", "one ONNX file at opset 18 in fp32, fp16 or int8, samples folded into the batch", "", "onnx"),
    Entry("triton", "a model repository for Triton Inference Server", "", "triton"),
)
