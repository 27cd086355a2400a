"""What is timed side by side: files, and the loop that people write."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress_uq.bundle import Bundle
from compress_uq.data import Splits
from compress_uq.errors import GateError, InputError
from compress_uq.export import export_onnx, split_model
from compress_uq.footprint import peak_of_process
from compress_uq.models import as_logits
from compress_uq.runtime import session
from compress_uq.uncertain import UncertainModel, as_given
from compress_uq.uq import Members, SampledDropout
from compress_uq.uq.hooks import bare_copy

__all__ = ["DENSE", "EAGER", "FLOOR", "EagerLoop", "File", "compressed_files", "dense_file", "floor_files"]

DENSE, EAGER, FLOOR = "dense, one pass", "dense, eager loop", "floor"


@dataclass(frozen=True)
class File:
    """An ONNX file to be timed."""

    name: str
    content: bytes
    precision: str | None = None
    layout: str | None = None
    images: int = 1
    """Of the file for each image that is asked about: T for a tail that runs for all members."""


class EagerLoop:
    """Dropout switched on in a dense network, and T forward passes in a Python loop: what sampling costs without care.

    Args:
        dense: the network; copied.
        members: T, and where the dropout sits, if it is dropout that tells them apart.

    Raises:
        InputError: the network has no module where the members drop.
    """

    def __init__(self, dense: nn.Module, members: Members) -> None:
        self.network, self.passes = bare_copy(dense).eval(), members.count
        for site in members.sites if isinstance(members, SampledDropout) else ():
            if site.of_weights:
                continue
            try:
                module = self.network.get_submodule(site.module)
            except AttributeError as error:
                raise InputError(
                    f"the dense model has no {site.module}, where the compressed one drops: it is another architecture"
                ) from error
            module.register_forward_hook(_Drop(site.p))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) to mean probabilities (N, K)."""
        return torch.stack([as_logits(self.network(images)).softmax(1) for _ in range(self.passes)]).mean(0)

    def to(self, device: str) -> EagerLoop:
        """A copy on a device."""
        other = copy.copy(self)
        other.network = copy.deepcopy(self.network).to(device)
        return other

    def peak_bytes(self, shape: Sequence[int], batch: int) -> int:
        """Resident memory of a process with torch that runs it, at most.

        Raises:
            GateError: it cannot be run in another process, as a network of a class that is not importable.
        """
        content = io.BytesIO()
        try:
            torch.save(self, content)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise GateError(f"memory of the eager loop was not measured: {error}") from error
        code = "from compress_uq.measuring.alternatives import _run_loop; _run_loop()"
        return peak_of_process(code, [str(size) for size in (batch, *shape)], content.getvalue())


class _Drop:
    """After a module: whole channels of maps, single values of anything else."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return F.dropout2d(output, self.p) if output.ndim == 4 else F.dropout(output, self.p)


def _run_loop() -> None:
    """What the other process does."""
    torch.set_num_threads(1)
    loop = torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=False)
    loop(torch.zeros([int(size) for size in sys.argv[1:]]))


def dense_file(dense: nn.Module, model: UncertainModel) -> File:
    """One pass of the dense network.

    Raises:
        GateError: it cannot be exported.
    """
    return File(DENSE, _exported(as_given([dense], model.origin), precision="fp32", layout="fold"), "fp32")


def floor_files(model: UncertainModel) -> Iterator[File]:
    """The trunk for N images and the tail for T * N, plain and apart; none where members share no network."""
    parts = split_model(model)
    if parts is None:
        return
    if parts.trunk is not None:
        yield File(f"{FLOOR}: trunk", parts.trunk)
    yield File(f"{FLOOR}: tail", parts.tail, images=parts.members)


def compressed_files(
    model: UncertainModel | Bundle,
    precisions: Sequence[str],
    layouts: Sequence[str] | None,
    quantization: str,
    splits: Splits | None,
    note: Callable[[str], None],
) -> Iterator[File]:
    """The compressed model in every precision and layout; the file of a bundle stands for itself.

    Raises:
        InputError: a name that is not there, or images that are missing.
    """
    bundled = model if isinstance(model, Bundle) else None
    if bundled is not None and bundled.uncertain is None:
        note("this bundle's model is not rebuilt without its architecture: only model.onnx is timed")
        yield _bundled(bundled)
        return
    uncertain = model.model if isinstance(model, Bundle) else model
    own = None if bundled is None else _bundled(bundled)
    for precision in precisions:
        for layout in layouts or uncertain.members.layouts:
            if own is not None and (own.precision, own.layout) == (precision, layout):
                yield own
                continue
            content = _exported(uncertain, precision=precision, layout=layout, quantization=quantization, splits=splits)
            yield File(f"compressed, {precision}, {layout}", content, precision, layout)


def _bundled(bundle: Bundle) -> File:
    recorded = session(bundle.onnx).get_modelmeta().custom_metadata_map
    precision = recorded.get("compress_uq.precision", '"fp32"').strip('"')
    layout = recorded.get("compress_uq.layout", '"fold"').strip('"')
    return File(f"compressed, {precision}, {layout}", bundle.onnx, precision, layout)


def _exported(model: UncertainModel, **options: Any) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model, path, **options)
        return path.read_bytes()
