"""Which channels go: one criterion a file."""

from compress_uq.pruning.criteria.by_name import CRITERIA, configured_criterion, resolve_criterion
from compress_uq.pruning.criteria.criterion import Criterion, Evidence, PerLayer, least_important

__all__ = [
    "CRITERIA",
    "Criterion",
    "Evidence",
    "PerLayer",
    "configured_criterion",
    "least_important",
    "resolve_criterion",
]
