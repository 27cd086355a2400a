"""Ensembles: networks trained apart, each a member."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset

from compress_uq.cost import evaluation_mode
from compress_uq.data import ImageDataset
from compress_uq.errors import InputError, UncertaintyError
from compress_uq.models import as_logits
from compress_uq.stages import Origin
from compress_uq.uq.base import Method, Trained, check_samples, describe_networks
from compress_uq.uq.members import Members, Networks

__all__ = ["Ensemble"]

_MADE_OF_ONE = 5


@dataclass(frozen=True)
class Ensemble(Method):
    """The mean of the softmaxes of networks that were trained apart (Lakshminarayanan et al. 2017, section 2.4).

    `samples` is the number of members; None means one for each dense model, and 5 where there is only one. Members
    differ by their training's seed. Those made of one dense model also differ by what is pruned: the scores that rank
    its channels get Gaussian noise of `perturbation` standard deviations, but for the first, which is pruned as asked.
    With `bootstrap` each is trained on as many training images, drawn with replacement (Breiman 1996).
    """

    samples: int | None = None
    bootstrap: bool = False
    perturbation: float = 1.0

    name = "ensemble"

    def __post_init__(self) -> None:
        if self.samples is not None:
            check_samples(self.samples, 2, ": an ensemble of one network is 'msp'")
        if not (math.isfinite(self.perturbation) and self.perturbation >= 0):
            raise InputError(f"perturbation={self.perturbation}: expected standard deviations of 0 or more")

    @property
    def networks(self) -> int:
        """How many are trained; of one dense model where `samples` is None."""
        return self.samples or _MADE_OF_ONE

    def of_models(self, count: int) -> Method:
        """As many members as models, or some multiple; of one model, as many as wanted.

        Raises:
            UncertaintyError: the models cannot have equal shares in the members.
        """
        if count == 1:
            return replace(self, samples=self.networks)
        if (self.samples or count) % count:
            raise UncertaintyError(
                f"{self.samples} members of {count} models: expected {count} or a multiple, so that each model has as "
                "many; leave out --samples (samples=) for one of each"
            )
        return replace(self, samples=self.samples or count)

    def training_images(self, train: ImageDataset, seed: int) -> ImageDataset:
        """All, or with `bootstrap` as many, drawn with replacement from the seed."""
        if not self.bootstrap:
            return train
        count = len(train)  # type: ignore[arg-type]
        drawn = torch.randint(count, (count,), generator=torch.Generator().manual_seed(seed))
        return Subset(train, drawn.tolist())

    def prepare(self, model: nn.Module, origin: Origin) -> nn.Module:
        """A plain copy."""
        return copy.deepcopy(model)

    def fit(self, trained: Trained) -> Members:
        """The networks as members.

        Raises:
            UncertaintyError: a single one, another number than asked for, the same one twice, or networks that do not
                answer for the same images with as many classes.
        """
        models = trained.models
        if len(models) == 1:
            raise UncertaintyError(
                "an ensemble needs several models: pass a list of fine-tuned ones to fit_uncertainty; compress makes "
                "the members of one model by itself"
            )
        if self.samples not in (None, len(models)):
            raise UncertaintyError(f"samples={self.samples}, and {len(models)} models were given")
        _refuse_strangers(models, trained.origin)
        _refuse_twins(models)
        return Networks(models, _shared_head(models, trained.head()))

    def restore(self, networks: Sequence[nn.Module], structure: Mapping[str, Any]) -> Members:
        """The networks as members."""
        return Networks(networks, structure.get("head"))

    def describe(self, model: nn.Module, origin: Origin) -> dict[str, object]:
        """As many passes as members."""
        return describe_networks(self, self.networks, model, origin)


def _refuse_strangers(models: Sequence[nn.Module], origin: Origin) -> None:
    """Members answer for the same images, with as many classes."""
    classes = []
    for number, model in enumerate(models, 1):
        example = origin.example(model, "ensemble")
        try:
            with evaluation_mode(model), torch.no_grad():
                classes.append(as_logits(model(example)).shape[1])
        except (RuntimeError, ValueError, IndexError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UncertaintyError(
                f"member {number} of the ensemble does not run on images of shape {tuple(example.shape[1:])}: {reason}"
            ) from error
        if classes[-1] != classes[0]:
            raise UncertaintyError(
                f"member {number} of the ensemble has {classes[-1]} classes and the first has {classes[0]}: members "
                "answer for the same labels"
            )


def _refuse_twins(models: Sequence[nn.Module]) -> None:
    """An ensemble of equal networks says nothing that one of them does not."""
    weights = [dict(model.named_parameters()) for model in models]
    for (i, one), (j, other) in itertools.combinations(enumerate(weights, 1), 2):
        if one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one):
            raise UncertaintyError(
                f"members {i} and {j} of the ensemble have the same weights: train them apart (epochs above 0, other "
                "seeds), or prune them apart (perturbation above 0)"
            )


def _shared_head(models: Sequence[nn.Module], head: str | None) -> str | None:
    """The classifier's name where all members have it and as many features enter it."""
    weights = [dict(model.named_parameters()).get(f"{head}.weight") for model in models]
    shapes = {None if weight is None else tuple(weight.shape) for weight in weights}
    return head if len(shapes) == 1 and None not in shapes else None
