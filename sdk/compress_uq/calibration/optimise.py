"""Minimising a penalised likelihood, and choosing how strong the penalty is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import minimize

from compress_uq.calibration.images import spread_folds

__all__ = ["Objective", "minimum", "weakest_that_helps"]

Objective = Callable[[np.ndarray], tuple[float, np.ndarray]]
"""A vector to a value and its gradient."""

_FOLDS = 3


def minimum(objective: Objective, start: np.ndarray) -> np.ndarray:
    """The vector (P,) where the objective is least (L-BFGS)."""
    found = minimize(
        objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 300, "ftol": 1e-9, "gtol": 1e-6}
    )
    best: np.ndarray = found.x
    return best


def weakest_that_helps(
    penalties: Sequence[float],
    labels: np.ndarray,
    fitted: Callable[[np.ndarray, float, np.ndarray | None], np.ndarray],
    held_out_nll: Callable[[np.ndarray, np.ndarray], float],
) -> float:
    """Of penalties, strongest first, the last before the cross-validated NLL gets worse.

    Args:
        penalties: strongest first, so that what each one finds is where the next one starts.
        labels: (N,), which the folds are balanced by.
        fitted: indices, a penalty and a start to the parameters.
        held_out_nll: parameters and indices to the mean NLL of those images.
    """
    fold = spread_folds(labels, _FOLDS, seed=0)
    parts = [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(_FOLDS)]
    starts: list[np.ndarray | None] = [None] * _FOLDS
    best, lowest = penalties[0], np.inf
    for penalty in penalties:
        found = [fitted(inside, penalty, start) for (inside, _), start in zip(parts, starts, strict=True)]
        nll = float(np.mean([held_out_nll(x, outside) for (_, outside), x in zip(parts, found, strict=True)]))
        if nll >= lowest:
            break
        best, lowest, starts = penalty, nll, list(found)
    return best
