"""Last-layer Laplace: a Gaussian over the classifier's weights, its answer in closed form in one pass."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset

from compress_uq.cost import on_device
from compress_uq.data import ImageDataset, Splits
from compress_uq.errors import InputError, UncertaintyError
from compress_uq.models import as_logits
from compress_uq.predict import collect
from compress_uq.stages import Origin
from compress_uq.training import resolve_device
from compress_uq.uq.base import Method, Trained, describe_networks
from compress_uq.uq.curvature import Curvature, Factors
from compress_uq.uq.features import head_inputs, tap_head
from compress_uq.uq.hooks import bare_copy
from compress_uq.uq.members import Members

__all__ = ["Laplace", "LaplaceHead"]

_PRIORS = ("evidence", "held-out")
_LOOKED_AT = 8
"""Images that tell beforehand whether logits are linear in what enters the classifier."""
_PRECISIONS = [float(value) for value in np.geomspace(1e-4, 1e4, 161)]


class LaplaceHead(Members):
    """One member: a network whose logits are divided by sqrt(1 + pi / 8 variance), each class by its own.

    Args:
        network: the trained network; copied, in eval.
        head: its classifier, of D features and K classes.
        basis: (D + 1, D + 1), the curvature's `input_vectors`; the last feature is 1, for the bias.
        spread: (D + 1, K), the curvature's `spread`.
        found: what was chosen; plain values.
    """

    count = 1
    basis: Tensor
    spread: Tensor

    def __init__(
        self, network: nn.Module, head: str, basis: Tensor, spread: Tensor, found: Mapping[str, object] | None = None
    ) -> None:
        super().__init__()
        self.network, self.head = bare_copy(network).eval().requires_grad_(False), head
        self.found = dict(found or {})
        tap_head(self.network, head)
        self.register_buffer("basis", basis.float())
        self.register_buffer("spread", spread.float())

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The one."""
        return (self.network,)

    def forward(self, images: Tensor, seed: Tensor | None = None) -> Tensor:
        """Images (N, C, H, W) to logits (1, N, K) float32."""
        return self.with_features(images, seed)[0]

    def with_features(self, images: Tensor, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (1, N, K) and what enters the classifier (1, N, D), float32."""
        logits, features = _run(self.network, images)
        variance = _with_one(features).matmul(self.basis).square().matmul(self.spread)
        return _probit(logits, variance).unsqueeze(0), features.unsqueeze(0)


@dataclass(frozen=True)
class Laplace(Method):
    """Laplace approximation of the classifier's weights (Ritter et al. 2018; Kristiadi et al. 2020).

    Kronecker-factored, the prior's precision added exactly, the probit link in closed form: the price of one pass.
    `prior_precision` is `evidence` (the highest marginal likelihood, from training images alone), `held-out` (the
    lowest negative log-likelihood on calibration images), or a number.
    """

    prior_precision: float | str = "evidence"

    name = "laplace"
    acts_last: ClassVar[bool] = True

    def __post_init__(self) -> None:
        given = self.prior_precision
        valid = given in _PRIORS if isinstance(given, str) else 0 < given < math.inf
        if not valid:
            raise InputError(f"prior_precision={given!r}: expected evidence, held-out, or a number above 0")

    @property
    def looks_at_calibration(self) -> bool:
        """`held-out` chooses the prior on them."""
        return self.prior_precision == "held-out"

    def prepare(self, model: nn.Module, origin: Origin) -> nn.Module:
        """A plain copy."""
        return copy.deepcopy(model)

    def check(self, model: nn.Module, origin: Origin, splits: Splits, steps: int) -> None:
        """Refuse missing images, and a classifier that something else follows; training changes neither."""
        images = splits.require("train", "laplace")
        if self.prior_precision == "held-out":
            splits.require("calibration", "prior_precision='held-out'")
        network, few = bare_copy(model).eval(), Subset(images, range(min(_LOOKED_AT, len(images))))  # type: ignore[arg-type]
        collect(lambda batch: as_logits(network(batch)), few)  # first: that it runs at all
        head = _head(Trained((network,), origin))
        tap_head(network, head)
        _factors(network, head, few, "cpu")

    def fit(self, trained: Trained) -> Members:
        """One pass over the training images, two eigendecompositions, and a search for the precision.

        Raises:
            UncertaintyError: several models, no training images, no classifier that can be told or that gives the
                logits, or no calibration images for `held-out`.
        """
        network, images = bare_copy(trained.one(self.name)).eval(), trained.images("laplace")
        head = _head(trained)
        tap_head(network, head)
        curvature = _factors(network, head, images, trained.device).decomposed()
        precision = self._precision(curvature, network, head, trained)
        return LaplaceHead(
            network, head, curvature.input_vectors, curvature.spread(precision), {"prior_precision": precision}
        )

    def _precision(self, curvature: Curvature, network: nn.Module, head: str, trained: Trained) -> float:
        if not isinstance(self.prior_precision, str):
            return self.prior_precision
        if self.prior_precision == "evidence":
            squared_norm = float(_weights(network, head).square().sum())
            return max(_PRECISIONS, key=lambda precision: curvature.evidence(precision, squared_norm))
        if trained.calibration is None:
            raise UncertaintyError(
                "prior_precision='held-out' is chosen on calibration images: pass splits with a calibration split"
            )
        device = resolve_device(trained.device)
        with on_device(network, device):
            (logits, features), labels = collect(lambda batch: _run(network, batch), trained.calibration, device=device)
        squares = (_with_one(torch.from_numpy(features)).double() @ curvature.input_vectors).square()

        def nll(precision: float) -> float:
            scaled = _probit(torch.from_numpy(logits).double(), squares @ curvature.spread(precision))
            return float(F.cross_entropy(scaled, torch.from_numpy(labels)))

        return min(_PRECISIONS, key=nll)

    def restore(self, networks: Sequence[nn.Module], structure: Mapping[str, Any]) -> Members:
        """The network, with room for the tensors."""
        classes, features = _weights(networks[0], structure["head"]).shape
        basis, spread = torch.zeros(features, features), torch.zeros(features, classes)
        return LaplaceHead(networks[0], structure["head"], basis, spread, structure.get("found"))

    def describe(self, model: nn.Module, origin: Origin) -> dict[str, object]:
        """One pass and two products of the classifier's size."""
        classes, features = _weights(model, _head(Trained((model,), origin))).shape
        extra = features * (features + classes)
        return describe_networks(self, 1, model, origin, more_macs=extra, more_bytes=4 * extra)


def _head(trained: Trained) -> str:
    head = trained.head()
    if head is None:
        raise UncertaintyError("laplace needs a classifier, a last layer with weights that runs once: none was found")
    return head


def _weights(network: nn.Module, head: str) -> Tensor:
    """The classifier's weights with the bias as the last column (K, D + 1), float64 on the CPU."""
    module = network.get_submodule(head)
    weight = module.weight
    if not isinstance(weight, Tensor) or math.prod(weight.shape[2:]) != 1:
        raise UncertaintyError(f"laplace takes a linear classifier or a 1x1 convolution: {head} is {module}")
    bias = module.bias if isinstance(module.bias, Tensor) else torch.zeros(len(weight), device=weight.device)
    return torch.cat([weight.detach().flatten(1), bias.detach().unsqueeze(1)], 1).double().cpu()


def _factors(network: nn.Module, head: str, images: ImageDataset, device_name: str) -> Factors:
    weights, device, factors = _weights(network, head), resolve_device(device_name), Factors()

    def add(batch: Tensor) -> None:
        logits, features = _run(network, batch)
        entering = _with_one(features)
        _refuse_if_not_linear(logits, entering, weights, head)
        factors.add(logits, entering)

    with on_device(network, device):
        collect(add, images, device=device)
    return factors


def _refuse_if_not_linear(logits: Tensor, features: Tensor, weights: Tensor, head: str) -> None:
    if features.shape[1] == weights.shape[1]:
        linear = features.double().cpu() @ weights.T
        if linear.shape == logits.shape and torch.allclose(linear.float(), logits.cpu(), rtol=1e-2, atol=1e-2):
            return
    raise UncertaintyError(
        f"laplace needs logits that are linear in what enters the classifier: {head} is followed by something else, "
        "such as a ReLU, or is grouped; take another method"
    )


def _run(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, K) and what enters the classifier (N, D), float32."""
    with head_inputs() as kept:
        logits = as_logits(network(images)).float()
    return logits, kept[0]


def _probit(logits: Tensor, variance: Tensor) -> Tensor:
    """Logits whose softmax stands for the mean softmax of independent Gaussians (MacKay 1992; Gibbs 1997)."""
    return logits / (1 + math.pi / 8 * variance).sqrt()


def _with_one(features: Tensor) -> Tensor:
    return F.pad(features, (0, 1), value=1.0)
