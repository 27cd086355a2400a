"""Mask ensembles: a few fixed masks, trained in, that each make a member of one network (Masksembles)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from compress_uq.data import Splits
from compress_uq.errors import InputError, UncertaintyError
from compress_uq.stages import Origin
from compress_uq.uq.base import Method, Trained, check_samples
from compress_uq.uq.dropout import SampledDropout, find_fold, restored
from compress_uq.uq.dropout_training import DropoutNetwork
from compress_uq.uq.hooks import bare_copy
from compress_uq.uq.mc_dropout import DropoutPlan, MCDropout
from compress_uq.uq.members import Members
from compress_uq.uq.sites import Site, find_head

__all__ = ["MaskEnsemble", "overlapping_masks"]

_FEWEST_CHANNELS = 8
_DRAWS = 200
"""Tries for each number of positions until the masks cover the channels exactly."""


@dataclass(frozen=True)
class MaskEnsemble(Method):
    """Fixed masks over channels, each trained on its share of every batch (Durasov et al. 2021, section 3).

    `samples` masks keep the same number of channels each. `scale`, above 1, sets how little they share: two masks keep
    about 1 / (2 scale - 1) of what either keeps in common. Kept channels are not scaled up, since the network is
    trained with the masks as they are. `at` and `sampling_budget` choose sites as for `MCDropout`.
    """

    at: str | tuple[str, ...] = "auto"
    samples: int = 4
    scale: float = 2.0
    sampling_budget: float = 0.75
    seed: int = 0

    name = "mask-ensemble"
    trained_apart = True

    def __post_init__(self) -> None:
        check_samples(self.samples, 2, ": a mask ensemble has no fewer members")
        if not 1 < self.scale <= 6:
            raise InputError(f"scale={self.scale}: expected above 1, where all masks are alike, and at most 6")
        self._dropout()

    def for_training(self) -> Method:
        """Refused: a dense model keeps no masks, and without them it is not the network that was trained.

        Raises:
            UncertaintyError: always.
        """
        raise UncertaintyError(
            "mask-ensemble trains its masks in after pruning: train the dense model without --uq, or with mc-dropout"
        )

    def check(self, model: nn.Module, origin: Origin, splits: Splits, steps: int) -> None:
        """Refuse masks that no step would train."""
        if not steps:
            raise UncertaintyError(
                "no epoch is left for fine-tuning (epochs=0), and mask-ensemble trains its masks there"
            )

    def prepare(self, model: nn.Module, origin: Origin) -> nn.Module:
        """A copy with the masks in it, dealt to the images of each training batch.

        Raises:
            UncertaintyError: no place for masks, none within the budget, or too few channels there.
        """
        sites = self.plan(model, origin).sites
        generator = torch.Generator().manual_seed(self.seed)
        return DropoutNetwork(copy.deepcopy(model), sites, [self._masks(site, generator) for site in sites])

    def as_prepared(self, model: nn.Module) -> Method:
        """The same at exactly the sites of a prepared network, whatever they cost elsewhere."""
        assert isinstance(model, DropoutNetwork)
        return replace(self, at=tuple(site.module for site in model.sites))

    def fit(self, trained: Trained) -> Members:
        """One member per mask.

        Raises:
            UncertaintyError: the model was not trained with the masks.
        """
        model, origin = trained.one(self.name), trained.origin
        if not isinstance(model, DropoutNetwork) or model.trained_steps == 0:
            raise UncertaintyError(
                "mask-ensemble needs a model that was trained with its masks: pass method='mask-ensemble' to finetune "
                "(or train what prepare_uncertainty returns), for at least one epoch"
            )
        example = origin.example(model, "mask-ensemble")
        bare = bare_copy(model.network).eval()
        return SampledDropout(
            bare, model.sites, len(model.masks[0]), fold=find_fold(bare, model.sites, example), masks=model.masks,
            head=find_head(bare, example), modes=("fixed",),
        )  # fmt: skip

    def restore(self, networks: Sequence[nn.Module], structure: Mapping[str, Any]) -> Members:
        """Members with masks of the right shapes."""
        return restored(networks[0], structure, modes=("fixed",))

    def describe(self, model: nn.Module, origin: Origin) -> dict[str, object]:
        """Sites, share of channels that a mask drops, and cost."""
        plan = self.plan(model, origin)
        for site in plan.sites:
            self._check(site)
        return {
            **plan.cost_of(self),
            "sites": [site.module for site in plan.sites],
            "dropped_share": 1 - _kept_share(self.samples, self.scale),
        }

    def plan(self, model: nn.Module, origin: Origin) -> DropoutPlan:
        """Choose the sites; see `MCDropout.plan`."""
        return self._dropout().plan(model, origin)

    def _dropout(self) -> MCDropout:
        """What shares its sites and its cost."""
        share = 1 - _kept_share(self.samples, self.scale)
        return MCDropout(share, self.at, self.samples, self.sampling_budget, "channel", seed=self.seed)

    def _check(self, site: Site) -> int:
        channels = max(site.shape)
        if channels < _FEWEST_CHANNELS:
            raise UncertaintyError(
                f"mask-ensemble: {site.module} has {channels} channels, at least {_FEWEST_CHANNELS} are needed: "
                "prune less, or name other sites with --dropout-at (at=)"
            )
        return channels

    def _masks(self, site: Site, generator: torch.Generator) -> Tensor:
        channels = self._check(site)
        return overlapping_masks(self.samples, channels, self.scale, generator).reshape(-1, *site.shape)


def overlapping_masks(masks: int, channels: int, scale: float, generator: torch.Generator) -> Tensor:
    """(masks, channels) of 0 and 1, no two alike: the same number of ones in each, every channel in at least one.

    As in Durasov et al. 2021, section 3.2: with m ones, each mask takes m of about m * scale positions at random, and
    positions that no mask takes are left out. m follows from the number of positions that are left on average,
    m * scale * (1 - (1 - 1 / scale) ** masks), and a draw that does not leave exactly `channels` is drawn again.

    Raises:
        UncertaintyError: no such masks were found.
    """
    ones = max(1, round(channels * _kept_share(masks, scale)))
    positions = (
        [channels] if ones * masks < channels else range(max(ones, channels), math.ceil(ones * scale) + channels)
    )
    nearest = sorted(positions, key=lambda count: abs(count - ones * scale))
    for count in nearest[:50]:
        if not channels <= count:
            continue
        for _ in range(_DRAWS):
            taken = torch.stack([torch.randperm(count, generator=generator) < ones for _ in range(masks)])
            used = taken.any(0)
            if int(used.sum()) == channels and len(torch.unique(taken, dim=0)) == masks:
                return taken[:, used].float()
    raise UncertaintyError(
        f"no {masks} masks of {ones} of {channels} channels with scale {scale} were found: take another scale"
    )


def _kept_share(masks: int, scale: float) -> float:
    """Share of the channels that one mask keeps, on average over draws."""
    return float(1 / (scale * (1 - (1 - 1 / scale) ** masks)))
