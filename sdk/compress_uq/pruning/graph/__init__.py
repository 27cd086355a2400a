"""Which channels have to go together, and their removal; the only door to torch-pruning."""

from compress_uq.pruning.graph.groups import CoupledLayer, Group, dependency_groups, filters
from compress_uq.pruning.graph.refusals import naming_what_breaks, refuse_unprunable

__all__ = ["CoupledLayer", "Group", "dependency_groups", "filters", "naming_what_breaks", "refuse_unprunable"]
