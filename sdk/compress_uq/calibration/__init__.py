"""Calibrators: fitted on their own images, applied to members' logits."""

from compress_uq.calibration.base import Calibrator, Identity
from compress_uq.calibration.temperature import Temperature
from compress_uq.registry import Entry, Registry

__all__ = ["CALIBRATORS", "Calibrator", "Identity", "Temperature"]

CALIBRATORS: Registry[type[Calibrator]] = Registry(
    "calibrator",
    Entry("none", "probabilities as the members give them", "", Identity),
    Entry("temperature", "one temperature on the members' logits", "Guo 2017, section 4.2", Temperature),
)
