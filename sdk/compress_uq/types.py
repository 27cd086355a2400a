"""The tuple that every model of this package answers with, in torch, in ONNX and in numpy."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["DECISION_NAMES", "OUTPUT_NAMES", "Prediction"]


class Prediction(NamedTuple):
    """What an uncertain model says about N images and K classes; torch tensors or numpy arrays, never mixed.

    The names and their order are those of the ONNX outputs.
    """

    probabilities: Any
    """(N, K) float32: calibrated mean over members."""
    label: Any
    """(N,) int64: argmax of `probabilities`."""
    confidence: Any
    """(N,) float32: maximum of `probabilities`."""
    uncertainty: Any
    """(N,) float32: higher is less certain; the score behind AUSE and the risk figures."""
    entropy: Any
    """(N,) float32: Shannon entropy of `probabilities`, nats."""
    mutual_information: Any
    """(N,) float32: entropy of the mean minus mean entropy of the members, nats; 0 for one member."""
    variance: Any
    """(N,) float32: variance (ddof 0) over members of the predicted class's probability."""
    ood_score: Any
    """(N,) float32: higher is more out-of-distribution."""
    accepted: Any = None
    """(N,) bool, or None where no decision rule was fitted."""
    prediction_set: Any = None
    """(N, K) bool, or None where no decision rule was fitted."""


OUTPUT_NAMES: tuple[str, ...] = Prediction._fields[:8]
"""What every exported file gives."""

DECISION_NAMES: tuple[str, ...] = Prediction._fields[8:]
"""What it gives besides, each where its rule was fitted."""
