"""Curvature of the loss in a classifier's weights, as two Kronecker factors; what it says of variances and priors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Curvature", "Factors"]


class Factors:
    """Sums over images of the generalised Gauss-Newton matrix's factors for cross-entropy, float64.

    Outputs: diag(p) - p p^T (K, K), added up. Inputs: outer products of features (D, D), on average (Martens and
    Grosse 2015; Ritter et al. 2018, equation 6).
    """

    def __init__(self) -> None:
        self._output: Tensor | float = 0.0
        self._inputs: Tensor | float = 0.0
        self._count = 0

    def add(self, logits: Tensor, features: Tensor) -> None:
        """Count a batch: logits (N, K), features (N, D)."""
        p, phi = logits.double().softmax(1), features.double()
        self._output = self._output + torch.diag(p.sum(0)) - p.T @ p
        self._inputs = self._inputs + phi.T @ phi
        self._count += len(p)

    def decomposed(self) -> Curvature:
        """Their eigenvectors and eigenvalues, on the CPU."""
        output, inputs = torch.as_tensor(self._output).cpu(), torch.as_tensor(self._inputs).cpu() / self._count
        output_values, output_vectors = torch.linalg.eigh(output)
        input_values, input_vectors = torch.linalg.eigh(inputs)
        return Curvature(output_vectors, output_values.clamp_min(0), input_vectors, input_values.clamp_min(0))


@dataclass(frozen=True)
class Curvature:
    """A symmetric matrix over weights (K, D), the Kronecker product of two factors, by eigenvectors and eigenvalues."""

    output_vectors: Tensor
    """(K, K), columns."""
    output_values: Tensor
    """(K,)."""
    input_vectors: Tensor
    """(D, D), columns."""
    input_values: Tensor
    """(D,)."""

    def spread(self, precision: float) -> Tensor:
        """(D, K): the logits' variances (N, K) are (features @ input_vectors)^2 times this.

        The posterior covariance is the inverse of the curvature plus `precision` times the identity, exactly: the
        precision is added to the products of eigenvalues.
        """
        inverse = 1 / (torch.outer(self.input_values, self.output_values) + precision)
        return inverse @ self.output_vectors.T.square()

    def evidence(self, precision: float, squared_norm: float) -> float:
        """Log marginal likelihood of a prior precision, up to what does not depend on it (MacKay 1992, equation 4.9).

        Args:
            squared_norm: of the weights (K, D).
        """
        ratio = torch.log1p(torch.outer(self.input_values, self.output_values) / precision).sum()
        return -0.5 * (float(ratio) + precision * squared_norm)
