"""Which channels go, when, and their removal."""

from compress_uq.pruning.amounts import Amount, Target, kept_channels
from compress_uq.pruning.bn import BatchNormScale
from compress_uq.pruning.criteria import CRITERIA, configured_criterion, resolve_criterion
from compress_uq.pruning.criterion import Criterion, Evidence, PerLayer
from compress_uq.pruning.fpgm import FPGM
from compress_uq.pruning.graph import CoupledLayer, Group
from compress_uq.pruning.hessian import Hessian
from compress_uq.pruning.hrank import HRank
from compress_uq.pruning.l1 import L1
from compress_uq.pruning.l2 import L2
from compress_uq.pruning.lamp import LAMP
from compress_uq.pruning.loss import Loss
from compress_uq.pruning.prune import PrunedLayer, PruneResult, PruningOptions, prunable_layers, prune, pruning_share
from compress_uq.pruning.random import Random
from compress_uq.pruning.resrep import ResRep
from compress_uq.pruning.schedules import SCHEDULES, Iterative, Lottery, OneShot, Schedule, configured_schedule
from compress_uq.pruning.targets import TargetReached
from compress_uq.pruning.taylor import Taylor
from compress_uq.pruning.weights import MaskedLayer, MaskResult, mask_weights, remove_masks

__all__ = [
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
