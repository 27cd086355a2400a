"""The criteria by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from compress_uq.config import configured
from compress_uq.errors import PruningError
from compress_uq.pruning.criteria.bn import BatchNormScale
from compress_uq.pruning.criteria.criterion import Criterion, OwnCriterion
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
from compress_uq.pruning.graph.groups import Group
from compress_uq.registry import Entry, Registry

__all__ = ["CRITERIA", "configured_criterion", "resolve_criterion"]

CRITERIA: Registry[type[Criterion]] = Registry(
    "criterion",
    Entry("random", "channels drawn at random, the control", "Holzbock", Random),
    Entry("l1", "L1 norm of a channel's filters", "Li 2017, section 3.1", L1),
    Entry("l2", "L2 norm of a channel's filters", "Li 2017, section 3.1", L2),
    Entry("bn", "scale of the batch norm after a layer", "Liu 2017, section 3", BatchNormScale),
    Entry("hrank", "average rank of a channel's feature maps", "Lin 2020", HRank),
    Entry("taylor", "first-order change of the loss", "Molchanov 2019, equation 8", Taylor),
    Entry("fpgm", "distance to a layer's other filters", "He 2019", FPGM),
    Entry("lamp", "squared weights over those not smaller", "Lee 2021", LAMP),
    Entry("hessian", "second-order change of the loss, Gauss-Newton diagonal", "LeCun 1990", Hessian),
    Entry("loss", "change of the loss, or of the worst class's accuracy, without a channel", "Charpentier", Loss),
    Entry("resrep", "compactors trained to forget channels, folded away exactly", "Ding 2021, section 3", ResRep),
)


def configured_criterion(name: str, options: Mapping[str, str]) -> Criterion:
    """A criterion by name, its options given as texts.

    Raises:
        UnknownNameError: no such criterion or option; names the nearest.
    """
    return configured(CRITERIA[name], options)


def resolve_criterion(criterion: str | Criterion | Callable[[Group], Tensor]) -> Criterion:
    """A configured criterion, from its name, as given, or around a function.

    Raises:
        UnknownNameError: no such criterion; names the nearest.
    """
    if isinstance(criterion, str):
        return CRITERIA[criterion]()
    if isinstance(criterion, Criterion):
        return criterion
    if callable(criterion) and not isinstance(criterion, type):
        return OwnCriterion(criterion)
    raise PruningError(
        f"criterion={criterion!r}: expected a configured criterion, a function from a group to its channels' "
        f"importance, or a name: {', '.join(CRITERIA.names)}"
    )
