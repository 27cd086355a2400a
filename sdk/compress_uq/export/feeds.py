"""What the gates feed a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto

from compress_uq.data import ImageDataset
from compress_uq.errors import ArtifactError, InputError
from compress_uq.export.layouts import Layout, recorded_layout
from compress_uq.predict import default_batch_size
from compress_uq.uncertain import UncertainModel

__all__ = ["Feed", "extreme_feed", "gate_image_count", "gate_images", "random_feed", "torch_answers"]

Feed = Mapping[str, np.ndarray]

_COMPARED, _FEWEST = 64, 4
_RANGE = 3.0
"""Normalised images reach about that far from 0."""


def gate_image_count(shape: Sequence[int]) -> int:
    """Images (C, H, W) on which a file is compared with torch, at most; fewer where they are large."""
    return min(_COMPARED, max(4, default_batch_size(shape) // 4))


def gate_images(dataset: ImageDataset, recorded: Mapping[str, Any]) -> np.ndarray | None:
    """Images to feed a graph, spread evenly over a data set, in the layout that the file records under `input`.

    None where there are too few for the gates.

    Raises:
        InputError: they are not of the size that the file takes.
    """
    total = len(dataset)  # type: ignore[arg-type]
    layout = _layout(recorded)
    shape = tuple(dataset[0][0].shape)
    if shape != tuple(recorded["shape"]):
        raise InputError(f"the data's images are of shape {shape}: the file takes {tuple(recorded['shape'])}")
    count = min(total, gate_image_count(shape))
    if count < _FEWEST:
        return None
    chosen = np.linspace(0, total - 1, count).round().astype(int)
    return layout.fed(torch.stack([dataset[i][0].float() for i in chosen.tolist()]))


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


def torch_answers(model: UncertainModel, feed: Feed, recorded: Mapping[str, Any], draw: int = 0) -> list[np.ndarray]:
    """What torch answers to a feed, in the layout that the file records; `draw` seeds what is drawn anew."""
    images, *seed = (torch.from_numpy(value) for value in feed.values())
    layout = _layout(recorded)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw)
        answers = model(layout(images), *seed)
    return [field.numpy() for field in answers if field is not None]


def takes_pixels(proto: onnx.ModelProto) -> bool:
    """Whether images are uint8."""
    return bool(proto.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8)


def _layout(recorded: Mapping[str, Any]) -> Layout:
    try:
        return recorded_layout(recorded)
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"the ONNX file does not say how images are fed to it: {error}") from error


def _shape(proto: onnx.ModelProto) -> list[int]:
    return [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim[1:]]
