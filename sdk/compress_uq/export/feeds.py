"""What the gates feed a graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto

from compress_uq.errors import ArtifactError
from compress_uq.export.layouts import recorded_layout
from compress_uq.uncertain import UncertainModel

__all__ = ["extreme_feed", "random_feed", "torch_answers"]

Feed = Mapping[str, np.ndarray]

_RANGE = 3.0
"""Normalised images reach about that far from 0."""


def random_feed(proto: onnx.ModelProto, images: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Five random images, or those given, and seeds where the graph takes them."""
    random = np.random.default_rng(1)
    shape = _shape(proto)
    if images is None:
        images = (
            random.integers(0, 256, (5, *shape)).astype(np.uint8)
            if takes_pixels(proto)
            else random.normal(size=(5, *shape)).astype(np.float32)
        )
    feed = {"images": images}
    if len(proto.graph.input) > 1:
        feed["seed"] = random.integers(-(2**62), 2**62, len(images))
    return feed


def extreme_feed(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    """The darkest and the brightest image, and two whose values are one or the other."""
    random = np.random.default_rng(2)
    shape = _shape(proto)
    bright = np.concatenate([np.stack([np.zeros(shape), np.ones(shape)]), random.integers(0, 2, (2, *shape))])
    images = bright * 255 if takes_pixels(proto) else (bright * 2 - 1) * _RANGE
    return random_feed(proto, images.astype(np.uint8 if takes_pixels(proto) else np.float32))


def torch_answers(model: UncertainModel, feed: Feed, recorded: Mapping[str, Any]) -> list[np.ndarray]:
    """What torch answers to a feed, in the layout that the file records."""
    images, *seed = (torch.from_numpy(value) for value in feed.values())
    try:
        layout = recorded_layout(recorded)
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"the ONNX file does not say how images are fed to it: {error}") from error
    with torch.no_grad():
        answers = model(layout(images), *seed)
    return [field.numpy() for field in answers if field is not None]


def takes_pixels(proto: onnx.ModelProto) -> bool:
    """Whether images are uint8."""
    return bool(proto.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8)


def _shape(proto: onnx.ModelProto) -> list[int]:
    return [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim[1:]]
