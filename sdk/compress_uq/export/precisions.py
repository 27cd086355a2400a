"""In which numbers a file computes its members; what follows their logits is float32 in all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
import torch
from torch.utils.data import Subset

from compress_uq.data import Splits, batches
from compress_uq.errors import GateError, InputError
from compress_uq.export.body import tensors_outside_networks
from compress_uq.export.casts import transpose_before_rounding
from compress_uq.export.graph import example_inputs
from compress_uq.export.half import HalfMembers
from compress_uq.export.integer import SCHEMES, nodes_reading, quantise
from compress_uq.export.layouts import Layout
from compress_uq.export.member_layouts import MemberLayout
from compress_uq.predict import default_batch_size
from compress_uq.registry import Entry, Registry
from compress_uq.runtime import survives_loading
from compress_uq.uncertain import UncertainModel

__all__ = ["PRECISIONS", "Precision", "calibration_images"]

_IMAGES, _BATCH = 1000, 32


@dataclass(frozen=True)
class Precision(ABC):
    """A number format, built for one export.

    Args:
        quantization: the scheme's name, where there is one.
    """

    quantization: str = "cpu"
    name: ClassVar[str]
    needs_images: ClassVar[bool] = False
    rounds: ClassVar[bool] = True
    """Whether the members' logits are others than in float32."""

    @abstractmethod
    def body(
        self, model: UncertainModel, layout: Layout, splits: Splits | None, members: MemberLayout
    ) -> onnx.ModelProto:
        """The graph of the members in this format and layout."""

    def described(self) -> dict[str, Any] | None:
        """How numbers are quantised; plain values."""
        return None


class Single(Precision):
    """float32 throughout."""

    name = "fp32"
    rounds = False

    def body(
        self, model: UncertainModel, layout: Layout, splits: Splits | None, members: MemberLayout
    ) -> onnx.ModelProto:
        """As torch computes it."""
        return members.finish(members.trace(model.members, model, layout), model)


class Half(Precision):
    """Weights and activations of the networks in float16, norms in float32."""

    name = "fp16"

    def body(
        self, model: UncertainModel, layout: Layout, splits: Splits | None, members: MemberLayout
    ) -> onnx.ModelProto:
        """Authored in torch.

        Raises:
            GateError: onnxruntime's optimiser for CPUs crashes on it.
        """
        halves = HalfMembers(model.members, *example_inputs(model, 2))
        graph = members.trace(halves, model, layout)
        transpose_before_rounding(graph)
        body = members.finish(graph, model)
        if not survives_loading(body.SerializeToString()):
            raise GateError("gate 'loads': this model in fp16 makes onnxruntime crash on this CPU: export fp32 or int8")
        return body


class Integer(Precision):
    """Convolutions and matrix products of the networks in 8-bit integers."""

    name = "int8"
    needs_images = True

    def body(
        self, model: UncertainModel, layout: Layout, splits: Splits | None, members: MemberLayout
    ) -> onnx.ModelProto:
        """Quantised by the ranges seen on the calibration split.

        Raises:
            InputError: no such scheme, or no calibration split.
        """
        scheme = SCHEMES[self.quantization]
        if splits is None:
            raise InputError("precision 'int8' takes its ranges from images: pass --data (splits=, with calibration)")
        graph = members.trace(model.members, model, layout)
        feeds = _feeds(graph, model, splits, members)
        left = nodes_reading(graph, tensors_outside_networks(model.members))
        return members.finish(quantise(graph, scheme, feeds, left), model)

    def described(self) -> dict[str, Any]:
        """Scheme, types and ranges."""
        scheme = SCHEMES[self.quantization]
        return {
            "scheme": self.quantization,
            "activations": "int8" if scheme.symmetric else "uint8",
            "weights": "int8, per channel",
            "symmetric": scheme.symmetric,
            "ranges": f"mean of the extremes over batches of {_BATCH}, {_IMAGES} calibration images at most",
        }


PRECISIONS: Registry[type[Precision]] = Registry(
    "precision",
    Entry(Single.name, "float32 throughout", "", Single),
    Entry(Half.name, "networks in float16, what follows the logits in float32", "", Half),
    Entry(Integer.name, "convolutions and matrix products in 8-bit integers, the rest in float32", "", Integer),
)


def calibration_images(splits: Splits, why: str, count: int = _IMAGES) -> Iterator[torch.Tensor]:
    """Batches (B, C, H, W) of at most `count` calibration images, spread evenly over the split.

    Raises:
        DataError: no calibration split.
    """
    dataset = splits.require("calibration", why)
    total = len(dataset)  # type: ignore[arg-type]
    chosen = np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int))
    size = min(_BATCH, default_batch_size(dataset[0][0].shape))
    for images, _ in batches(Subset(dataset, chosen.tolist()), size):
        yield images


def _feeds(
    graph: onnx.ModelProto, model: UncertainModel, splits: Splits, members: MemberLayout
) -> Iterator[dict[str, np.ndarray]]:
    first = graph.graph.input[0].name
    for number, images in enumerate(calibration_images(splits, "precision 'int8'")):
        seed = None
        if model.members.sampling == "seeded":
            seed = torch.from_numpy(np.random.default_rng(number).integers(-(2**62), 2**62, len(images)))
        yield {first: images.numpy(), **members.feed(model.members, images, seed, number)}
