"""Monte-Carlo dropout: several passes with parts of the network dropped, most of each pass shared."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from compress_uq.cost import measure_cost
from compress_uq.errors import InputError, UncertaintyError, UnknownNameError
from compress_uq.stages import Origin
from compress_uq.training import resolve_device
from compress_uq.uq.base import Method, Trained, check_samples, cost_line
from compress_uq.uq.dropout import SampledDropout, find_fold, restored, sampled_macs
from compress_uq.uq.dropout_training import DropoutNetwork
from compress_uq.uq.fidelity import choose_masks, why_not_compared
from compress_uq.uq.hooks import bare_copy
from compress_uq.uq.kinds import KINDS
from compress_uq.uq.members import Members
from compress_uq.uq.sites import Site, find_head, find_sites, functional_dropout, named_sites

__all__ = ["DropoutPlan", "MCDropout"]


@dataclass(frozen=True)
class DropoutPlan:
    """Where dropout goes and what T members cost."""

    sites: tuple[Site, ...]
    fold: str | None
    """The module whose input is repeated for the members; None: the output of the first site."""
    samples: int
    trunk_macs: int
    """MACs of one image up to where the members part."""
    tail_macs: int
    """MACs of one member after that."""
    dense_macs: int
    stored_bytes: int
    """Of the network and its members' masks."""

    @property
    def macs(self) -> int:
        """MACs of one image with all its members."""
        return self.trunk_macs + self.samples * self.tail_macs

    @property
    def ratio(self) -> float:
        """Cost of a prediction as a share of one dense pass."""
        return self.macs / self.dense_macs

    def cost_of(self, method: Method) -> dict[str, object]:
        """The cost line of a method with these sites."""
        return cost_line(method, self.samples, self.macs, self.dense_macs, self.stored_bytes)


@dataclass(frozen=True)
class MCDropout(Method):
    """Dropout at test time (Gal and Ghahramani 2016), its masks stratified and its trunk shared.

    `p` None is the rate of the model's own dropout layers, and 0.1 where dropout is inserted. `at` is `auto` (the
    largest set of sites, latest first, whose `samples` members cost at most `sampling_budget` of a dense pass in
    MACs), or names or patterns of modules. `kind` is what is dropped: `auto` (the model's own dropout layers as they
    are, channels where it is new), `channel`, `element` (single activations), `filter` (the filters of layers, before
    their norm) or `connection` (single weights; Wan 2013). `seed` draws the fixed masks; where calibration images are
    at hand, they are the best of `candidates` draws, see `choose_masks`.
    """

    p: float | None = None
    at: str | tuple[str, ...] = "auto"
    samples: int = 20
    sampling_budget: float = 0.75
    kind: str = "auto"
    candidates: int = 16
    seed: int = 0

    name = "mc-dropout"
    trained_apart = True

    def __post_init__(self) -> None:
        if self.p is not None and not 0 < self.p < 1:
            raise InputError(f"dropout p={self.p}: expected a rate above 0 and below 1")
        check_samples(self.samples)
        if self.kind not in KINDS:
            raise UnknownNameError("dropout kind", self.kind, KINDS)
        if self.candidates < 1:
            raise InputError(f"candidates={self.candidates}: expected at least 1 draw of masks")
        if not self.sampling_budget > 0:
            raise InputError(f"sampling_budget={self.sampling_budget}: expected a share of a dense pass above 0")

    @property
    def looks_at_calibration(self) -> bool:
        """Masks are chosen on them, without their labels."""
        return self.samples > 1 and self.candidates > 1

    def prepare(self, model: nn.Module, origin: Origin) -> nn.Module:
        """A copy with dropout in it, random while it trains.

        Raises:
            UncertaintyError: no place for dropout, or none within the budget.
        """
        return DropoutNetwork(copy.deepcopy(model), self.plan(model, origin).sites)

    def is_prepared(self, model: nn.Module) -> bool:
        """True for a network that has its dropout."""
        return isinstance(model, DropoutNetwork)

    def as_prepared(self, model: nn.Module) -> Method:
        """The same at exactly the sites of a prepared network, whatever they cost elsewhere."""
        assert isinstance(model, DropoutNetwork)
        return replace(self, at=tuple(site.module for site in model.sites))

    def for_training(self) -> Method:
        """The same without a bound on the cost: dropout at every site, as far as they are not named."""
        return replace(self, sampling_budget=math.inf)

    def plain(self, prepared: nn.Module) -> nn.Module:
        """The network that dropout was put into."""
        assert isinstance(prepared, DropoutNetwork)
        return bare_copy(prepared.network)

    def fit(self, trained: Trained) -> Members:
        """T members of a network that `prepare` made, or of a plain one."""
        model, origin = trained.one(self.name), trained.origin
        example = origin.example(model, "mc-dropout")
        if isinstance(model, DropoutNetwork):
            network, sites = model.network, model.sites
            fold = find_fold(network, sites, example)
        else:
            plan = self.plan(model, origin)
            network, sites, fold = model, plan.sites, plan.fold
        bare = bare_copy(network).eval()
        images = trained.calibration
        masks, reason = None, why_not_compared(self.samples, 0 if images is None else len(images))  # type: ignore[arg-type]
        found: dict[str, object] = {"not_compared": reason}
        if images is not None and reason is None:
            masks, fidelity = choose_masks(
                bare, sites, self.samples, images, fold=fold, example=example, draws=self.candidates, seed=self.seed,
                device=resolve_device(trained.device),
            )  # fmt: skip
            found = {"fidelity": asdict(fidelity)}
        return SampledDropout(
            bare, sites, self.samples, seed=self.seed, fold=fold, masks=masks, head=find_head(bare, example),
            found=found,
        )  # fmt: skip

    def restore(self, networks: Sequence[nn.Module], structure: Mapping[str, Any]) -> Members:
        """Members with masks of the right shapes."""
        return restored(networks[0], structure)

    def describe(self, model: nn.Module, origin: Origin) -> dict[str, object]:
        """Sites, rates and cost."""
        plan = self.plan(model, origin)
        return {
            **plan.cost_of(self),
            "kind": self.kind,
            "sites": [site.module for site in plan.sites],
            "p": sorted({site.p for site in plan.sites}),
            "own_dropout": plan.sites[0].own,
            "functional_dropout": list(functional_dropout(model, origin.example(model, "mc-dropout"))),
        }

    def plan(self, model: nn.Module, origin: Origin) -> DropoutPlan:
        """Choose the sites.

        Raises:
            UncertaintyError: no place for dropout, a name that is not in the model, or no site within the budget.
        """
        example = origin.example(model, "mc-dropout")
        dense = origin.dense_cost.macs if origin.dense_cost else measure_cost(model, example.shape[1:]).macs
        bare = bare_copy(model.network if isinstance(model, DropoutNetwork) else model).eval()
        if self.at != "auto":
            names = self.at.split(",") if isinstance(self.at, str) else self.at
            return self._cost(bare, named_sites(bare, names, example, self.p, self.kind), example, dense)
        candidates = find_sites(bare, example, self.p, self.kind)
        chosen: DropoutPlan | None = None
        for first in range(len(candidates) - 1, -1, -1):
            plan = self._cost(bare, candidates[first:], example, dense)
            if plan.ratio > self.sampling_budget:
                if chosen is None:
                    raise UncertaintyError(
                        f"no dropout site fits the sampling budget of {self.sampling_budget} dense passes: "
                        f"{self.samples} samples from {candidates[first].module} on cost {plan.ratio:.2f}; "
                        f"prune more, or allow it with --sampling-budget {plan.ratio + 0.005:.2f} (sampling_budget=), "
                        "or name sites with --dropout-at (at=)"
                    )
                break
            chosen = plan
        assert chosen is not None  # find_sites never returns nothing
        return chosen

    def _cost(self, model: nn.Module, sites: Sequence[Site], example: Tensor, dense: int) -> DropoutPlan:
        fold = find_fold(model, sites, example)
        trunk, tail = sampled_macs(model, sites, fold, example)
        tensors = [*model.parameters(), *model.buffers()]
        masks = self.samples * sum(math.prod(site.shape) for site in sites) * torch.float32.itemsize
        stored = sum(t.numel() * t.element_size() for t in tensors) + masks
        return DropoutPlan(tuple(sites), fold, self.samples, trunk, tail, dense, stored)
