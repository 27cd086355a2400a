"""Which channels go, when, and their removal."""

from compress_uq.pruning.amounts import LARGEST_SHARE, Amount, Target, kept_channels
from compress_uq.pruning.criteria.bn import BatchNormScale
from compress_uq.pruning.criteria.by_name import CRITERIA, configured_criterion, resolve_criterion
from compress_uq.pruning.criteria.criterion import Criterion, Evidence, PerLayer
from compress_uq.pruning.criteria.fpgm import FPGM
from compress_uq.pruning.criteria.hessian import Hessian
from compress_uq.pruning.criteria.hrank import HRank
from compress_uq.pruning.criteria.l1 import L1
from compress_uq.pruning.criteria.l2 import L2
from compress_uq.pruning.criteria.lamp import LAMP
from compress_uq.pruning.criteria.loss import Loss
from compress_uq.pruning.criteria.random import Random
from compress_uq.pruning.criteria.resrep import ResRep
from compress_uq.pruning.criteria.taylor import Taylor
from compress_uq.pruning.graph.groups import CoupledLayer, Group
from compress_uq.pruning.prune import PruneResult, PruningOptions, check_pruning, prunable_layers, prune, pruning_share
from compress_uq.pruning.record import PrunedLayer
from compress_uq.pruning.schedules import SCHEDULES, Iterative, Lottery, OneShot, Schedule, configured_schedule
from compress_uq.pruning.targets import TargetReached
from compress_uq.pruning.weights import MaskedLayer, MaskResult, mask_weights, remove_masks

__all__ = [
    "LARGEST_SHARE",
    "CRITERIA",
    "BatchNormScale",
    "FPGM",
    "Hessian",
    "HRank",
    "L2",
    "LAMP",
    "Loss",
    "Random",
    "ResRep",
    "Taylor",
    "L1",
    "SCHEDULES",
    "Amount",
    "CoupledLayer",
    "Criterion",
    "Evidence",
    "Group",
    "Iterative",
    "Lottery",
    "MaskResult",
    "MaskedLayer",
    "OneShot",
    "PerLayer",
    "PruneResult",
    "PrunedLayer",
    "PruningOptions",
    "Schedule",
    "Target",
    "TargetReached",
    "check_pruning",
    "configured_criterion",
    "configured_schedule",
    "kept_channels",
    "mask_weights",
    "prunable_layers",
    "prune",
    "pruning_share",
    "remove_masks",
    "resolve_criterion",
]
