"""A model cut in two: the members' logits, which may be computed in less precision, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import compose
from torch import Tensor, nn

from compress_uq.export.graph import example_inputs, output_names, trace
from compress_uq.export.layouts import FloatImages, Layout
from compress_uq.runtime import session
from compress_uq.uncertain import UncertainModel, summarise
from compress_uq.uq import Members

__all__ = [
    "FEATURES",
    "LOGITS",
    "NORMALISED",
    "FileMembers",
    "assemble",
    "body_graph",
    "of_features",
    "tensors_outside_networks",
]

LOGITS, FEATURES = "member_logits", "features"
"""Where the body ends, as tensors are named in the file: float32 from here on."""

NORMALISED = "normalised_images"
"""Where the body begins, in a file that takes pixels."""


class _Body(nn.Module):
    """Images to the members' logits (T, N, K), and the features (G, N, D) where a score looks at them."""

    def __init__(self, members: Members, of_features: bool) -> None:
        super().__init__()
        self.members, self.of_features = members, of_features

    def forward(self, images: Tensor, seed: Tensor | None = None) -> tuple[Tensor, ...]:
        return self.members.with_features(images, seed) if self.of_features else (self.members(images, seed),)


class _Summary(nn.Module):
    """What follows the logits, as plain outputs."""

    def __init__(self, model: UncertainModel) -> None:
        super().__init__()
        self.calibrator, self.score, self.ood_score = model.calibrator, model.score, model.ood_score
        self.acceptance, self.sets = model.acceptance, model.sets

    def forward(self, logits: Tensor, features: Tensor | None = None) -> tuple[Tensor, ...]:
        answers = summarise(
            logits, features, calibrator=self.calibrator, score=self.score, ood_score=self.ood_score,
            acceptance=self.acceptance, sets=self.sets,
        )  # fmt: skip
        return tuple(field for field in answers if field is not None)


class FileMembers(Members):
    """Members whose logits a graph computes, so that what comes after them can be fitted on that graph's answers.

    Args:
        content: a body's graph, as `body_graph` makes it.
        like: the members that it stands for.
    """

    def __init__(self, content: bytes, like: Members) -> None:
        super().__init__()
        self.count, self.sampling, self.head, self.found = like.count, like.sampling, like.head, like.found
        self._content, self._like = content, like
        made = session(content)
        self._run: Callable[[Any, dict[str, np.ndarray]], list[np.ndarray]] = made.run
        self._input = made.get_inputs()[0].name

    def __deepcopy__(self, _memo: Any) -> FileMembers:
        return self  # nothing in it changes

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """None: they are in the graph."""
        return ()

    def forward(self, images: Tensor, seed: Tensor | None = None) -> Tensor:
        """Logits (T, N, K) float32; seeds that are missing are 0."""
        return torch.from_numpy(self._answers(images, seed)[0])

    def with_features(self, images: Tensor, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (T, N, K) and features (G, N, D), float32."""
        logits, features = self._answers(images, seed)
        return torch.from_numpy(logits), torch.from_numpy(features)

    def _answers(self, images: Tensor, seed: Tensor | None) -> list[np.ndarray]:
        feed = {self._input: images.cpu().numpy()}
        if self.sampling == "seeded":
            feed["seed"] = np.zeros(len(images), np.int64) if seed is None else seed.cpu().numpy()
        return self._run(None, feed)


def body_graph(members: Members, model: UncertainModel, layout: Layout) -> onnx.ModelProto:
    """The graph from normalised images to `LOGITS` and, where a score of the model looks at them, `FEATURES`."""
    images, *seed = example_inputs(model, 2)
    first = "images" if isinstance(layout, FloatImages) else NORMALISED
    inputs = dict(zip((first, "seed"), (images, *seed), strict=False))
    return trace(_Body(members, of_features(model)), inputs, [LOGITS, FEATURES][: 1 + of_features(model)])


def of_features(model: UncertainModel) -> bool:
    """Whether a score looks at features."""
    return model.score.of_features or model.ood_score.of_features


def assemble(body: onnx.ModelProto, model: UncertainModel, layout: Layout) -> onnx.ModelProto:
    """A whole graph around a body: the layout before it, the summary behind it, both in float32."""
    images = example_inputs(model, 2)[0]
    with torch.no_grad():
        example = _Body(model.members, of_features(model))(*example_inputs(model, 2))
    parts = [(LOGITS, LOGITS), (FEATURES, FEATURES)][: len(example)]
    summary = trace(
        _Summary(model), dict(zip([name for name, _ in parts], example, strict=True)), output_names(model), 1
    )
    whole = _joined(body, summary, parts, "summary/")
    if isinstance(layout, FloatImages):
        return whole
    front = trace(layout, {"images": layout.like(images)}, [NORMALISED])
    return _joined(_prefixed(front, "input/"), whole, [(NORMALISED, NORMALISED)], "")


def _joined(
    first: onnx.ModelProto, second: onnx.ModelProto, parts: Sequence[tuple[str, str]], prefix: str
) -> onnx.ModelProto:
    """Two graphs, one behind the other; inputs and outputs keep their names."""
    later = _prefixed(second, prefix) if prefix else second
    later.ir_version = first.ir_version
    whole = compose.merge_models(first, later, io_map=list(parts), producer_name="", producer_version="")
    del whole.graph.value_info[:]
    del whole.opset_import[1:]  # each part brought the same one
    whole.graph.name = "main_graph"
    return whole


def _prefixed(proto: onnx.ModelProto, prefix: str) -> onnx.ModelProto:
    return compose.add_prefix(proto, prefix, rename_inputs=False, rename_outputs=False)


def tensors_outside_networks(members: Members) -> Mapping[str, Tensor]:
    """Tensors of members that belong to no network, such as a posterior's: they stay in float32."""
    inside = {id(t) for network in members.networks for t in (*network.parameters(), *network.buffers())}
    return {name: t for name, t in (*members.named_parameters(), *members.named_buffers()) if id(t) not in inside}
