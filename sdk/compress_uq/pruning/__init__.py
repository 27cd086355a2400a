"""Which channels go, and their removal."""

from compress_uq.pruning.graph import CoupledLayer, Group
from compress_uq.pruning.prune import CRITERIA, Criterion, PrunedLayer, PruneResult, kept_channels, prune

__all__ = ["CRITERIA", "CoupledLayer", "Criterion", "Group", "PruneResult", "PrunedLayer", "kept_channels", "prune"]
