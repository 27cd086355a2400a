"""Convolutions and matrix products in 8-bit integers, by quantise-dequantise pairs; everything else stays as it is."""

from __future__ import annotations

import contextlib
import copy
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from compress_uq.errors import CompressUQError, GateError
from compress_uq.registry import Entry, Registry
from compress_uq.runtime import quantisation_tools

__all__ = ["OPERATORS", "SCHEMES", "Scheme", "quantise"]

OPERATORS = ("Conv", "ConvTranspose", "MatMul", "Gemm")

_REMOVABLE = ("Relu", "Clip")
"""An activation right behind a quantised operator is taken over by the range that its output is rounded to."""


@dataclass(frozen=True)
class Scheme:
    """Which integers: weights are signed, per channel and symmetric in each."""

    activations: str
    """`QUInt8` with a zero point, or `QInt8` around 0."""
    biases: bool
    """As int32, or left in float32."""
    outputs: bool
    """Whether results are rounded to integers as well as inputs, as ONNX Runtime's integer kernels want it; TensorRT
    joins an operator with the activation behind it and rounds after that."""

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is 0."""
        return self.activations == "QInt8"


SCHEMES: Registry[Scheme] = Registry(
    "quantization",
    Entry(
        "cpu", "activations uint8 with a zero point, weights int8 per channel (U8S8)", "", Scheme("QUInt8", True, True)
    ),
    Entry(
        "tensorrt", "activations and weights int8 around 0, biases float32 (S8S8)", "", Scheme("QInt8", False, False)
    ),
)


def quantise(
    body: onnx.ModelProto, scheme: Scheme, feeds: Iterable[Mapping[str, np.ndarray]], leave: Iterable[str]
) -> onnx.ModelProto:
    """A graph whose convolutions and matrix products are quantised.

    The range of an activation is the mean over feeds of its smallest and largest value: of the ways to find it the one
    whose mutual information ranked images most like float32's.

    Args:
        body: without anything that must stay in float32 but what `leave` names.
        feeds: inputs, read once and one at a time.
        leave: nodes to pass over.

    Raises:
        GateError: nothing could be quantised, or onnxruntime cannot quantise the graph.
    """
    tools = quantisation_tools()

    class Reader(tools.CalibrationDataReader):  # type: ignore[misc, name-defined]
        """Hands out one feed after the other."""

        def __init__(self) -> None:
            self.rest = iter(feeds)

        def get_next(self) -> Any:
            return next(self.rest, None)

    with tempfile.TemporaryDirectory() as folder, _quiet():
        out = Path(folder) / "quantised.onnx"
        try:
            tools.quantize_static(
                copy.deepcopy(body),  # the quantiser spoils what it is given
                out,
                Reader(),
                quant_format=tools.QuantFormat.QDQ,
                op_types_to_quantize=[*OPERATORS, *(_REMOVABLE if scheme.outputs else ())],
                nodes_to_exclude=list(leave),
                per_channel=True,
                activation_type=tools.QuantType[scheme.activations],
                weight_type=tools.QuantType.QInt8,
                calibrate_method=tools.CalibrationMethod.MinMax,
                extra_options={
                    "ActivationSymmetric": scheme.symmetric,
                    "WeightSymmetric": True,
                    "QuantizeBias": scheme.biases,
                    "CalibMovingAverage": True,
                    "OpTypesToExcludeOutputQuantization": [] if scheme.outputs else list(OPERATORS),
                },
            )
        except CompressUQError:
            raise
        except Exception as error:  # onnxruntime's errors have no common type
            raise GateError(f"onnxruntime cannot quantise this model: {str(error).strip().splitlines()[0]}") from error
        made = onnx.load(out)
    if not any(node.op_type == "QuantizeLinear" for node in made.graph.node):
        raise GateError(
            "int8: the model has no convolution or matrix product that can be quantised: export fp16 or fp32"
        )
    default = [item for item in made.opset_import if item.domain == ""]
    if len(default) != len(made.opset_import) and all(node.domain == "" for node in made.graph.node):
        del made.opset_import[:]
        made.opset_import.extend(default)
    del made.metadata_props[:]
    del made.graph.value_info[:]
    return made


def nodes_reading(proto: onnx.ModelProto, tensors: Iterable[str]) -> list[str]:
    """Names of the nodes that read a stored tensor whose name ends in one of these."""
    endings = tuple(tensors)
    return [node.name for node in proto.graph.node if any(name.endswith(endings) for name in node.input if endings)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser logs to the root logger and warns; a library does not."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
