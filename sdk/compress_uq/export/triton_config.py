"""The text of a Triton model configuration, typed from an exported graph."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from compress_uq.errors import ArtifactError

__all__ = ["INSTANCE_KINDS", "Tensor", "TritonOptions", "model_config", "tensors", "to_text"]


@dataclass(frozen=True)
class TritonOptions:
    """How Triton serves a model."""

    name: str = "classifier"
    """The model's name on the server, and of its folder in the repository: letters, digits, `_`, `-` and `.`."""
    backend: str = "onnxruntime"
    """`onnxruntime`, or `python`: a model.py that runs the file with the onnxruntime of the server's Python."""
    max_batch_size: int = 32
    """Images in one execution. Activations grow with images times members, so this bounds the memory."""
    preferred_batch_sizes: tuple[int, ...] = ()
    """Sizes at which the dynamic batcher stops waiting; without them it sends whatever is there."""
    queue_delay: int = 1000
    """Microseconds for which a request may wait for company."""
    instances: int = 1
    """Copies that run side by side, on each GPU where there are GPUs."""
    instance_kind: str = "auto"
    """`auto` (the GPU where there is one), `gpu` or `cpu`."""
    tensorrt: bool = False
    """Run through ONNX Runtime's TensorRT provider; one engine is built for all batch sizes."""
    tensorrt_cache: str | None = None
    """A folder on the server where built engines are kept; without one they are built at each start."""
    warm_up: bool = True
    """Run batches of 1 and `max_batch_size` before the model counts as ready."""


@dataclass(frozen=True)
class Tensor:
    """An input or output of a graph, without its batch axis."""

    name: str
    data_type: str
    """Triton's name, such as `TYPE_FP32`."""
    dims: tuple[int, ...]


class _Word(str):
    """A value that is written without quotes: a member of an enumeration."""


INSTANCE_KINDS = {"auto": "KIND_AUTO", "gpu": "KIND_GPU", "cpu": "KIND_CPU"}
"""Where instances run, and Triton's word for it."""

_TYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.INT64: "TYPE_INT64",
    onnx.TensorProto.UINT8: "TYPE_UINT8",
    onnx.TensorProto.BOOL: "TYPE_BOOL",
}


def tensors(values: Sequence[onnx.ValueInfoProto]) -> tuple[Tensor, ...]:
    """Inputs or outputs as Triton sees them.

    Raises:
        ArtifactError: a type that Triton has no name for, or an axis besides the batch that is not fixed.
    """
    found = []
    for value in values:
        kind = value.type.tensor_type
        dims = tuple(axis.dim_value for axis in kind.shape.dim[1:])
        if kind.elem_type not in _TYPES or 0 in dims:
            raise ArtifactError(f"{value.name} of the ONNX file has a type or a shape that cannot be served: {dims}")
        found.append(Tensor(value.name, _TYPES[kind.elem_type], dims))
    return tuple(found)


def model_config(
    options: TritonOptions, inputs: Sequence[Tensor], outputs: Sequence[Tensor], label_file: str | None
) -> dict[str, Any]:
    """The fields of a `ModelConfig` message, in the order of the text.

    Args:
        options: how it is served.
        inputs, outputs: of the graph.
        label_file: name of the file with the classes' names; None without one.
    """
    batching: dict[str, Any] = {"max_queue_delay_microseconds": options.queue_delay}
    if options.preferred_batch_sizes:
        batching["preferred_batch_size"] = list(options.preferred_batch_sizes)
    labelled = {"probabilities": {"label_filename": label_file}} if label_file else {}
    config: dict[str, Any] = {
        "name": options.name,
        "backend": options.backend,
        "max_batch_size": options.max_batch_size,
        "input": [_declared(tensor) for tensor in inputs],
        "output": [_declared(tensor) | labelled.get(tensor.name, {}) for tensor in outputs],
        "instance_group": [{"count": options.instances, "kind": _Word(INSTANCE_KINDS[options.instance_kind])}],
        "dynamic_batching": batching,
    }
    if options.tensorrt:
        config["optimization"] = {"execution_accelerators": {"gpu_execution_accelerator": [_tensorrt(options, inputs)]}}
    if options.warm_up:
        config["model_warmup"] = [_warm_up(size, inputs) for size in sorted({1, options.max_batch_size})]
    return config


def _declared(tensor: Tensor) -> dict[str, Any]:
    """Triton wants at least one axis behind the batch: (N,) is asked for as (N, 1) and reshaped."""
    declared: dict[str, Any] = {"name": tensor.name, "data_type": _Word(tensor.data_type), "dims": _dims(tensor)}
    return declared if tensor.dims else declared | {"reshape": {"shape": []}}


def _dims(tensor: Tensor) -> list[int]:
    return list(tensor.dims or (1,))


def _warm_up(size: int, inputs: Sequence[Tensor]) -> dict[str, Any]:
    filled = [
        {"key": t.name, "value": {"data_type": _Word(t.data_type), "dims": _dims(t), "zero_data": True}} for t in inputs
    ]
    return {"name": f"batch of {size}", "batch_size": size, "inputs": filled}


def _tensorrt(options: TritonOptions, inputs: Sequence[Tensor]) -> dict[str, Any]:
    """Without the range of shapes an engine is built again for each batch size that was not seen before."""
    most = max(options.preferred_batch_sizes, default=options.max_batch_size)
    parameters = {
        f"trt_profile_{which}_shapes": ",".join(f"{t.name}:{'x'.join(map(str, (size, *t.dims)))}" for t in inputs)
        for which, size in (("min", 1), ("opt", most), ("max", options.max_batch_size))
    }
    if options.tensorrt_cache is not None:
        parameters |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": options.tensorrt_cache}
    return {"name": "tensorrt", "parameters": [{"key": key, "value": value} for key, value in parameters.items()]}


def to_text(message: Mapping[str, Any], indent: str = "") -> str:
    """A message in protobuf's text format: a mapping is a message, a list of mappings a repeated one."""
    lines = []
    for name, value in message.items():
        for item in value if isinstance(value, list) and value and isinstance(value[0], Mapping) else [value]:
            if isinstance(item, Mapping):
                lines.append(f"{indent}{name} {{\n{to_text(item, indent + '  ')}{indent}}}\n")
            else:
                lines.append(f"{indent}{name}: {_scalar(item)}\n")
    return "".join(lines)


def _scalar(value: Any) -> str:
    return str(value) if isinstance(value, _Word) else json.dumps(value, ensure_ascii=False)
