"""The door to netcal: what it finds for one class against the rest, as plain arrays.

Nothing else imports it, and it is imported when something is fitted: it brings pyro, gpytorch and tensorboard along,
and takes seconds.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from types import ModuleType

import numpy as np

from compress_uq.errors import MissingDependencyError

__all__ = ["beta_fit", "histogram_fit", "isotonic_fit", "refuse_without_netcal"]


def histogram_fit(scores: np.ndarray, hits: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Edges (B + 1,) of bins of equal width and the share of hits in each (B,); an empty bin holds its middle.

    Args:
        scores: (N,) probabilities.
        hits: (N,) 0 or 1.
        bins: B.
    """
    found = _netcal("binning").HistogramBinning(bins).fit(scores, hits)
    return found._bin_bounds[0], found._bin_map


def isotonic_fit(scores: np.ndarray, hits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points (M,), (M,) of the rising curve through which scores are interpolated, flat beyond its ends."""
    found = _netcal("binning").IsotonicRegression().fit(scores, hits)._iso
    return found.X_thresholds_, found.y_thresholds_


def beta_fit(scores: np.ndarray, targets: np.ndarray) -> tuple[float, float, float]:
    """a, b, c of sigmoid(a log p - b log(1 - p) + c), a and b not negative.

    Args:
        scores: (N,) float64 inside 0..1.
        targets: (N,) two values, which need not be 0 and 1.
    """
    found = _netcal("scaling").BetaCalibration().fit(scores, targets, tensorboard=False)._sites
    a, b = found["weights"]["values"]
    return float(a), float(b), float(found["bias"]["values"][0])


def refuse_without_netcal() -> None:
    """Refuse to go on where netcal is not installed; it is not imported.

    Raises:
        MissingDependencyError: says how to install it.
    """
    if importlib.util.find_spec("netcal") is None:
        raise MissingDependencyError(
            "fitting the calibrators histogram, isotonic and beta needs netcal: pip install 'compress-uq[netcal]', or "
            "take temperature, vector or dirichlet"
        )


def _netcal(part: str) -> ModuleType:
    refuse_without_netcal()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"netcal.{part}")
