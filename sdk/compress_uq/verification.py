"""Checking an artifact again, long after it was made."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from compress_uq.bundle import Bundle
from compress_uq.errors import ArtifactError, GateError
from compress_uq.export import check_graph

__all__ = ["Verification", "verify"]


@dataclass(frozen=True)
class Verification:
    """What holds, check by check."""

    checks: Mapping[str, str]


def verify(
    artifact: str | os.PathLike[str] | Bundle,
    *,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    arch: str | None = None,
) -> Verification:
    """Check a bundle (hashes, and every gate of the export, parity with its torch model among them) or an .onnx file.

    Args:
        artifact: a bundle's folder, a bundle, or an exported file (for which there is no torch model to compare with).
        model: the dense module, for a bundle that names no architecture.
        arch: names the bundle's own `package.module:callable` again, to allow importing it.

    Raises:
        ArtifactError: something does not hold; says what.
    """
    checks: dict[str, str] = {}
    if isinstance(artifact, Bundle):
        content, torch_model = artifact.onnx, artifact.uncertain
    elif Path(artifact).is_dir():
        bundle = Bundle.load(artifact, model=model, arch=arch)
        checks["hashes"] = "every file matches the manifest"
        content, torch_model = bundle.onnx, bundle.uncertain
    elif Path(artifact).is_file():
        content, torch_model = Path(artifact).read_bytes(), None
    else:
        raise ArtifactError(f"{artifact}: no such bundle or file")
    try:
        checks |= check_graph(content, torch_model)
    except GateError as error:
        raise ArtifactError(f"{artifact if not isinstance(artifact, Bundle) else 'the bundle'}: {error}") from error
    return Verification(checks)
