"""What an exported graph has to pass before it is kept. Each gate is a function; each has caught a real trap."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import torch

from compress_uq.decisions import Rule
from compress_uq.errors import ArtifactError, GateError, InputError
from compress_uq.export.agreement import DECIDED_ON, LIKENESS, agree, alike, drawn_alike
from compress_uq.export.anatomy import check_one_file, check_operators, check_signature
from compress_uq.export.feeds import Feed, extreme_feed, random_feed, torch_answers
from compress_uq.export.formats import check_formats
from compress_uq.runtime import METADATA_PREFIX, session
from compress_uq.types import DECISION_NAMES, OUTPUT_NAMES
from compress_uq.uncertain import UncertainModel

__all__ = ["GATES", "GateInput", "NotCompared", "check_graph", "open_graph", "run_gate"]

_ROUNDING = 1e-13
"""Variance that float32 leaves among equal members, to the squared confidence: a rounding error of a probability."""

_DRAWS = 16
"""Calls whose averages are compared where each draws anew."""

_ANEW = "each call draws anew"


class NotCompared(str):
    """What a gate says that had nothing to compare."""

    def __new__(cls, why: str) -> NotCompared:
        """Says why."""
        return super().__new__(cls, f"not compared: {why}")


@dataclass(frozen=True)
class GateInput:
    """A graph, what runs it, and what torch says where the model is at hand."""

    proto: onnx.ModelProto
    content: bytes
    recorded: Mapping[str, Any]
    """The file's metadata."""
    model: UncertainModel | None = None
    """What it was made from, in float32."""
    images: np.ndarray | None = None
    """What is fed; random images by default."""

    @property
    def members(self) -> int:
        """How many the file says to have."""
        return int(self.recorded["samples"])

    @property
    def deterministic(self) -> bool:
        """False where each call draws anew."""
        return bool(self.recorded["sampling"] != "random")

    @cached_property
    def feed(self) -> Feed:
        """Images, and seeds where the graph takes them."""
        return random_feed(self.proto, self.images)

    @cached_property
    def expected(self) -> list[np.ndarray] | None:
        """Torch's answers to `feed`; None without a torch model."""
        return None if self.model is None else torch_answers(self.model, self.feed, self.recorded["input"])

    @cached_property
    def rules(self) -> Mapping[str, Rule]:
        """The rules behind the decisions, as the file records them."""
        return _recorded_rules(self.recorded.get("thresholds", {}), self.proto)

    @cached_property
    def _sessions(self) -> dict[bool, Any]:
        return {optimise: _loaded(self.content, optimise) for optimise in (True, False)}

    def optimised(self, feed: Feed) -> list[np.ndarray]:
        """The graph's answers under default options.

        Raises:
            GateError: it does not load, or cannot run these images.
        """
        return _answers(self._sessions[True], feed)

    def plain(self, feed: Feed) -> list[np.ndarray]:
        """The same with every optimisation off."""
        return _answers(self._sessions[False], feed)


def check_graph(content: bytes, model: UncertainModel | None, images: np.ndarray | None = None) -> dict[str, str]:
    """Run every gate on the bytes of a file; what each one found.

    Args:
        content: the file.
        model: what it was made from, in float32, for the comparison with torch.
        images: what to feed, in the file's layout, four or more; by default five random ones.

    Raises:
        GateError: the first that fails, by name.
        ArtifactError: not an ONNX file, or not one of ours.
    """
    given = open_graph(content, model, images)
    return {name: run_gate(name, given) for name in GATES}


def open_graph(content: bytes, model: UncertainModel | None, images: np.ndarray | None = None) -> GateInput:
    """What the gates look at; see `check_graph`.

    Raises:
        ArtifactError: not an ONNX file, or not one of ours.
    """
    try:
        proto = onnx.load_from_string(content)
    except Exception as error:  # protobuf's errors have no common type
        raise ArtifactError(f"not an ONNX file: {str(error).splitlines()[0]}") from error
    try:
        recorded = {
            p.key.removeprefix(METADATA_PREFIX): json.loads(p.value)
            for p in proto.metadata_props
            if p.key.startswith(METADATA_PREFIX)
        }
    except ValueError as error:
        raise ArtifactError(f"the metadata of the ONNX file are damaged: {error}") from error
    missing = sorted({"sampling", "samples", "input"} - set(recorded))
    if missing:
        raise ArtifactError(f"the ONNX file was not exported by compress-uq: its metadata lack {', '.join(missing)}")
    return GateInput(proto, content, recorded, model, images)


def run_gate(name: str, given: GateInput) -> str:
    """What a gate found.

    Raises:
        GateError: it does not hold; begins with its name.
    """
    try:
        return GATES[name](given)
    except GateError as error:
        raise GateError(f"gate {name!r}: {error}") from error


def _recorded_rules(thresholds: Mapping[str, Any], proto: onnx.ModelProto) -> dict[str, Rule]:
    """The rules behind a file's decisions, from its metadata."""
    decided = [output.name for output in proto.graph.output if output.name in DECISION_NAMES]
    try:
        return {
            name: DECIDED_ON[name][1][found["rule"]](found["options"], threshold=torch.tensor(found["threshold"]))
            for name, found in ((name, thresholds[name]) for name in decided)
        }
    except (KeyError, TypeError, InputError) as error:
        raise ArtifactError(f"the ONNX file does not say how it decides: {error}") from error


def _loaded(content: bytes, optimise: bool) -> Any:
    try:
        return session(content, optimise=optimise)
    except Exception as error:  # onnxruntime's errors have no common type
        raise GateError(f"onnxruntime refuses the graph: {_first_line(error)}") from error


def _answers(made: Any, feed: Feed) -> list[np.ndarray]:
    try:
        answers: list[np.ndarray] = made.run(None, dict(feed))
    except Exception as error:  # onnxruntime's errors have no common type
        raise GateError(f"onnxruntime cannot run {len(feed['images'])} images: {_first_line(error)}") from error
    return answers


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _operators(given: GateInput) -> str:
    """Opset 18, one domain, no control flow, no operator that a GPU runtime lacks, nothing random unless asked."""
    integer = bool(given.recorded.get("quantization"))
    return check_operators(given.proto, random=not given.deterministic, integer=integer)


def _signature(given: GateInput) -> str:
    """Names and order of inputs and outputs, one symbolic batch axis in front of all of them."""
    return check_signature(given.proto)


def _one_file(given: GateInput) -> str:
    """No tensor outside the file, and no trace of the machine that made it."""
    return check_one_file(given.proto, given.content)


def _precision(given: GateInput) -> str:
    """The members are computed in the numbers that the file names, and what follows their logits in float32."""
    return check_formats(given.proto, given.recorded)


def _loads(given: GateInput) -> str:
    """onnxruntime takes the graph, optimised and not, and runs it."""
    for run in (given.optimised, given.plain):
        run(given.feed)
        run({name: value[:1] for name, value in given.feed.items()})
    return f"{len(given.feed['images'])} images, and one"


def _finite(given: GateInput) -> str:
    """No answer is NaN or infinite, for the darkest and brightest images as well."""
    for feed in (given.feed, extreme_feed(given.proto)):
        for run in (given.optimised, given.plain):
            for output, values in zip(given.proto.graph.output, run(feed), strict=True):
                if not np.isfinite(values).all():
                    raise GateError(f"{output.name} holds NaN or infinite values")
    return "every output"


def _optimisation(given: GateInput) -> str:
    """The optimiser changes no answer."""
    if not given.deterministic:
        return NotCompared(_ANEW)
    return _compared(given, given.optimised(given.feed), given.plain(given.feed))


def _parity(given: GateInput) -> str:
    """onnxruntime answers as torch does in float32: with the same masks, or on average where each call draws anew."""
    if given.model is None or given.expected is None:
        return NotCompared("no torch model at hand")
    if given.deterministic:
        return _compared(given, given.optimised(given.feed), given.expected)
    got = [_named(given, given.optimised(given.feed)) for _ in range(_DRAWS)]
    wanted = [torch_answers(given.model, given.feed, given.recorded["input"], draw) for draw in range(_DRAWS)]
    return drawn_alike(got, [_named(given, answers) for answers in wanted])


def _batch(given: GateInput) -> str:
    """An image's answer depends neither on its place in the batch nor on its company."""
    if not given.deterministic:
        given.optimised({name: value[3:4] for name, value in given.feed.items()})
        return NotCompared(_ANEW)
    whole = given.optimised(given.feed)
    turned = given.optimised({name: value[::-1].copy() for name, value in given.feed.items()})
    agree(_named(given, [field[::-1] for field in turned]), _named(given, whole), given.rules)
    alone = given.optimised({name: value[3:4] for name, value in given.feed.items()})
    return agree(_named(given, alone), _named(given, [field[3:4] for field in whole]), given.rules)


def _members(given: GateInput) -> str:
    """Members that differ in torch differ as much in the file: nothing was merged or optimised away."""
    if given.members == 1:
        return "one member"
    answers = given.optimised(given.feed)
    got = _spread(answers)
    if got <= _ROUNDING:
        raise GateError(f"the {given.members} members are all alike: nothing is sampled")
    wanted = got if given.expected is None else _spread(given.expected)
    factor = 3 if given.deterministic else 30  # fresh samples of five images differ by themselves
    if not wanted / factor <= got <= factor * max(wanted, 1e-30):
        raise GateError(f"the variance over members is {got:.3g} in the file and {wanted:.3g} in torch")
    if not given.deterministic and np.array_equal(answers[0], given.optimised(given.feed)[0]):
        raise GateError("two calls gave the same answer, and fresh samples were asked for")
    return f"variance {got:.3g} of the squared confidence"


def _spread(answers: list[np.ndarray]) -> float:
    """Largest variance over members to the squared confidence: probabilities of 1,000 classes are small."""
    variance, confidence = (answers[OUTPUT_NAMES.index(name)] for name in ("variance", "confidence"))
    return float((variance / np.square(confidence.astype(np.float64))).max())


def _named(given: GateInput, answers: list[np.ndarray]) -> dict[str, np.ndarray]:
    return {output.name: answer for output, answer in zip(given.proto.graph.output, answers, strict=True)}


def _compared(given: GateInput, got: list[np.ndarray], wanted: list[np.ndarray]) -> str:
    """As near as the file's precision lets two ways of computing it come."""
    likeness = LIKENESS.get(given.recorded.get("precision", "fp32"))
    first, second = _named(given, got), _named(given, wanted)
    return agree(first, second, given.rules) if likeness is None else alike(first, second, likeness)


GATES: dict[str, Callable[[GateInput], str]] = {
    "operators": _operators,
    "signature": _signature,
    "one file": _one_file,
    "precision": _precision,
    "loads": _loads,
    "finite": _finite,
    "optimisation": _optimisation,
    "parity": _parity,
    "batch": _batch,
    "members": _members,
}
