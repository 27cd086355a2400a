"""Architectures and model files."""

from compress_uq.models.architectures import ARCHITECTURES, Architecture, build_model, import_callable
from compress_uq.models.files import (
    Checkpoint,
    DataRecord,
    ModelFile,
    load_model,
    open_model_file,
    read_checkpoint,
    save_model,
)
from compress_uq.models.layers import ChannelSelect
from compress_uq.models.outputs import as_logits
from compress_uq.models.weights import refuse_non_finite, versioned

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "ChannelSelect",
    "Checkpoint",
    "DataRecord",
    "ModelFile",
    "as_logits",
    "build_model",
    "import_callable",
    "load_model",
    "open_model_file",
    "read_checkpoint",
    "refuse_non_finite",
    "save_model",
    "versioned",
]
