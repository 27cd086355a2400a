"""Every calibrator, by name."""

from __future__ import annotations

import numpy as np

from compress_uq.calibration.base import Calibrator, Identity
from compress_uq.calibration.dirichlet import Dirichlet
from compress_uq.calibration.images import refuse_few, refuse_missing_classes
from compress_uq.calibration.one_vs_rest import Beta, Histogram, Isotonic
from compress_uq.calibration.temperature import Temperature
from compress_uq.calibration.vector import Vector
from compress_uq.errors import UnknownNameError
from compress_uq.registry import Entry, Registry

__all__ = ["AUTO", "CALIBRATORS", "check_labels", "check_name"]

AUTO = "auto"
"""In place of a name: chosen by cross-validation."""

# The fewest parameters first, which is the order that `choose` prefers them in.
CALIBRATORS: Registry[type[Calibrator]] = Registry(
    "calibrator",
    Entry("none", "probabilities as the members give them", "", Identity),
    Entry("temperature", "one temperature on the members' logits", "Guo 2017, section 4.2", Temperature),
    Entry("vector", "a scale and a bias per class on the members' logits", "Guo 2017, section 4.2", Vector),
    Entry("beta", "a beta curve per class on the mean, normalised", "Kull 2017, section 3", Beta),
    Entry("histogram", "15 bins per class on the mean, normalised", "Zadrozny 2001", Histogram),
    Entry("isotonic", "a rising curve per class on the mean, normalised", "Zadrozny 2002", Isotonic),
    Entry("dirichlet", "a matrix and a bias on the log of the mean, ODIR", "Kull 2019, equation 4", Dirichlet),
)


def check_name(name: str) -> None:
    """Refuse, before any work, a name that nothing could be fitted by.

    Raises:
        UnknownNameError: neither a calibrator's name nor `auto`; names the nearest.
        MissingDependencyError: the library that fits it is not installed.
    """
    if name == AUTO:
        return
    if name not in CALIBRATORS:
        raise UnknownNameError("calibrator", str(name), (*CALIBRATORS.names, AUTO))
    CALIBRATORS[name].refuse_unavailable()


def check_labels(name: str, labels: np.ndarray, classes: int) -> None:
    """Refuse, before any work, labels (N,) of calibration images that this calibrator could not be fitted on.

    Raises:
        CalibrationError: fewer images than classes, or none of a class that it needs.
    """
    if name == "none":
        return
    refuse_few(len(labels), classes)
    if name != AUTO and CALIBRATORS[name].every_class:
        refuse_missing_classes(name, labels, classes)
