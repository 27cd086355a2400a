"""Calibrators: fitted on their own images, applied to members' logits or to their mean."""

from compress_uq.calibration.base import Calibrator, Identity
from compress_uq.calibration.by_name import AUTO, CALIBRATORS, check_labels, check_name
from compress_uq.calibration.choice import Choice, calibrated, choose, fit_calibrator
from compress_uq.calibration.dirichlet import Dirichlet
from compress_uq.calibration.one_vs_rest import Beta, Histogram, Isotonic, OneVsRest
from compress_uq.calibration.temperature import Temperature
from compress_uq.calibration.vector import Vector

__all__ = [
    "AUTO",
    "CALIBRATORS",
    "Beta",
    "Calibrator",
    "Choice",
    "Dirichlet",
    "Histogram",
    "Identity",
    "Isotonic",
    "OneVsRest",
    "Temperature",
    "Vector",
    "calibrated",
    "check_labels",
    "check_name",
    "choose",
    "fit_calibrator",
]
