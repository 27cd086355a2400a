"""Ranks of many small matrices at once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["matrix_ranks"]

_TOGETHER = 1 << 19
"""Elements of the symmetric matrices that are eliminated together."""
_IN_CACHE = 1 << 14
"""Elements of the matrices that are multiplied together."""
_SMALLEST, _WIDEST = 5, 40
"""Sizes that elimination over the batch pays for: below, singular values are as fast; above, LAPACK is."""


def matrix_ranks(matrices: Tensor) -> Tensor:
    """Ranks (B,) int64 of matrices (B, m, n), each the very number that `torch.linalg.matrix_rank` gives.

    That counts singular values above `max(m, n) * eps * largest`. Their squares are the eigenvalues of A^T A, and in
    float64 the pivots of A^T A - t I have as many positive ones as there are eigenvalues above t (Sylvester's law of
    inertia). For float32 matrices that count is taken at a threshold above the tolerance. It is the rank where A has
    no more columns or rows than that which are not zero, or where a threshold below the tolerance gives the same.
    Only for the few others, where float32's rounding decides, are singular values computed, one by one.
    """
    if matrices.dtype != torch.float32 or min(matrices.shape[1:]) < _SMALLEST:
        return _by_singular_values(matrices)
    size = max(matrices.shape[1:])
    margin = max(4, size / 16)  # float32 singular values are off by no more than this many eps times the largest
    eps = torch.finfo(torch.float32).eps
    tall = matrices if matrices.shape[1] >= matrices.shape[2] else matrices.mT
    # A power of two would lay the rows of a chunk on the same lines of the cache.
    together = _TOGETHER // tall.shape[2] ** 2 + 8
    firsts = [_rank_or_bound(part, (eps * (size + margin)) ** 2) for part in tall.split(together)]
    ranks, settled = (torch.cat(column) for column in zip(*firsts, strict=True))
    left = (~settled).nonzero().flatten()
    left = left[ranks[left] != (tall[left].abs().sum(2) != 0).sum(1)]
    for part in left.split(together):
        below = _count_below_tolerance(tall[part], (eps * (size - margin)) ** 2)
        ranks[part] = torch.where(ranks[part] == below, below, -1)
    return _singly(matrices, ranks, ranks < 0)


def _by_singular_values(matrices: Tensor) -> Tensor:
    """Ranks (B,), from singular values of the whole batch where none is near the tolerance."""
    values = torch.linalg.svdvals(matrices)
    tolerance = values[:, :1] * (max(matrices.shape[1:]) * torch.finfo(matrices.dtype).eps)
    near = ((values > tolerance / 2) & (values < tolerance * 2)).any(1)
    return _singly(matrices, (values > tolerance).sum(1), near)


def _singly(matrices: Tensor, ranks: Tensor, doubtful: Tensor) -> Tensor:
    """The ranks, with the doubtful ones computed matrix by matrix: rounding depends on how a batch lies in memory."""
    for i in doubtful.nonzero().flatten().tolist():
        ranks[i] = torch.linalg.matrix_rank(matrices[i])
    return ranks


def _rank_or_bound(tall: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Singular values (B,) above the root of `factor` times the largest, and where all columns but zeros have one."""
    grams = _grams(tall)
    squares = grams.diagonal(dim1=1, dim2=2)
    columns = (squares != 0).sum(1)
    count = _count_above(grams, factor * squares.sum(1))  # the trace is no less than the largest eigenvalue
    return count, count == columns


def _count_below_tolerance(tall: Tensor, factor: float) -> Tensor:
    """Singular values (B,) above the root of `factor` times the largest, or more."""
    grams = _grams(tall)
    trace = grams.diagonal(dim1=1, dim2=2).sum(1)
    return _count_above(grams, factor * grams.square().sum((1, 2)) / trace)  # no more than the largest eigenvalue


def _grams(tall: Tensor) -> Tensor:
    """A^T A (B, n, n) in float64; the batch is the innermost dimension in memory where elimination runs over it."""
    batch, rows, n = tall.shape
    across = n <= _WIDEST
    flat = torch.empty((n * n, batch) if across else (batch, n * n), dtype=torch.float64)
    flat = flat.t() if across else flat
    step = max(1, _IN_CACHE // (rows * n))
    for start in range(0, batch, step):
        # NumPy multiplies small matrices faster than torch, and a matrix with its own transpose in half the work.
        part = tall[start : start + step].double().numpy()
        flat[start : start + step] = torch.from_numpy(np.matmul(part.transpose(0, 2, 1), part)).flatten(1)
    return flat.view(batch, n, n) if not across else flat.t().view(n, n, batch).permute(2, 0, 1)


def _count_above(symmetric: Tensor, threshold: Tensor) -> Tensor:
    """Eigenvalues (B,) above each matrix's threshold, or -1 where a pivot is too small to trust; overwrites."""
    # Matrices of zeros have the threshold 0, and no eigenvalue above it.
    shift = threshold.clamp_min(torch.finfo(torch.float64).tiny)
    symmetric.diagonal(dim1=1, dim2=2).sub_(shift.unsqueeze(1))
    if symmetric.shape[1] > _WIDEST:
        return _positive_blocks(symmetric)
    rest = symmetric.permute(1, 2, 0)
    for k in range(len(rest) - 1):
        column = rest[k + 1 :, k]
        rest[k + 1 :, k + 1 :].addcmul_((column / rest[k, k]).unsqueeze(1), column.unsqueeze(0), value=-1)
    pivots = rest.diagonal()
    return (pivots > 0).sum(1).masked_fill_(pivots.abs().amin(1) < 1e-2 * threshold, -1)


def _positive_blocks(symmetric: Tensor) -> Tensor:
    """Positive eigenvalues (B,), from L D L^T factorisations."""
    factors, pivots, _ = torch.linalg.ldl_factor_ex(symmetric)
    single = pivots > 0
    positive = (single & (factors.diagonal(dim1=1, dim2=2) > 0)).sum(1)
    # A 2x2 block of D, which two negative pivots mark, has one eigenvalue of each sign.
    counts: Tensor = positive + (~single).sum(1) // 2
    return counts
