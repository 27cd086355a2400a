"""What an uncertainty method is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from compress_uq.cost import measure_cost
from compress_uq.data import ImageDataset, Splits
from compress_uq.errors import InputError, UncertaintyError
from compress_uq.stages import Origin
from compress_uq.training import Observer
from compress_uq.uq.members import Members
from compress_uq.uq.sites import find_head

__all__ = ["Method", "Trained", "check_samples", "cost_line", "describe_networks"]


@dataclass(frozen=True)
class Trained:
    """What training left behind, and the images that a method may look at when it makes its members."""

    models: tuple[nn.Module, ...]
    """One, or each member of an ensemble."""
    origin: Origin
    observed: Mapping[str, Tensor] | None = None
    """What the method's observer held when the training ended."""
    train: ImageDataset | None = None
    calibration: ImageDataset | None = None
    device: str = "cpu"

    def one(self, method: str) -> nn.Module:
        """The only model.

        Raises:
            UncertaintyError: several were given.
        """
        if len(self.models) != 1:
            raise UncertaintyError(f"{method} takes one model, {len(self.models)} were given: 'ensemble' takes several")
        return self.models[0]

    def head(self) -> str | None:
        """The classifier's module, or None where it cannot be told."""
        if self.origin.input_shape is None:
            return None
        return find_head(self.models[0], self.origin.example(self.models[0], "finding the classifier"))

    def images(self, stage: str) -> ImageDataset:
        """The training images.

        Raises:
            UncertaintyError: they were not given.
        """
        if self.train is None:
            raise UncertaintyError(f"{stage} looks at training images: pass splits with a train split")
        return self.train


@dataclass(frozen=True)
class Method(ABC):
    """A method's configuration; it acts before fine-tuning (`prepare`), during it (`observer`), after it (`fit`)."""

    name: ClassVar[str]
    lr_schedule: ClassVar[str] = "one-cycle"
    """How the learning rate runs where the caller leaves it to the method."""
    trained_apart: ClassVar[bool] = False
    """Whether a network trained for this method is another than one trained for none."""
    watches: ClassVar[bool] = False
    """Whether it has an observer, so that it needs a training of its own."""
    acts_last: ClassVar[bool] = False
    """Whether all that it does is done to a network that is trained already."""

    @property
    def networks(self) -> int:
        """How many networks are trained, each on its own."""
        return 1

    @property
    def looks_at_calibration(self) -> bool:
        """Whether `fit` chooses something on the calibration images, where there are any."""
        return False

    @property
    def perturbation(self) -> float:
        """Of the scores that rank channels, where several networks are made of one dense model; see `prune`."""
        return 0.0

    def of_models(self, count: int) -> Method:
        """The same, told how many dense models there are.

        Raises:
            UncertaintyError: several, and the method takes one.
        """
        if count != 1:
            raise UncertaintyError(f"{self.name} takes one model, {count} were given: 'ensemble' takes several")
        return self

    def for_training(self) -> Method:
        """The same for a dense model that is only trained, so that no bound on the cost of its answers holds."""
        return self

    @property
    def training_note(self) -> str:
        """What of the method a dense model lacks that was trained with it, in words; empty where nothing is to say."""
        if self.watches:
            return (
                f"the checkpoint holds the network alone: {self.name} watches the weights that its members are drawn "
                "from, which are those left by pruning, so that it begins anew in fine-tuning"
            )
        if self.acts_last:
            return (
                f"the checkpoint is that of a plain training: all that {self.name} does, it does after the last "
                "training, which is fine-tuning"
            )
        return ""

    def training_images(self, train: ImageDataset, seed: int) -> ImageDataset:
        """The images that a network is trained on whose training has this seed."""
        return train

    def check(self, model: nn.Module, origin: Origin, splits: Splits, steps: int) -> None:
        """Refuse, before any training, what `fit` would refuse after it.

        Args:
            model: a dense model.
            splits: those that the run has.
            steps: of the optimiser in fine-tuning; 0 where it is left out.

        Raises:
            InputError: what `fit` would raise, as far as it can be told.
        """
        if self.watches and not steps:
            raise UncertaintyError(
                f"no epoch is left for fine-tuning (epochs=0), and {self.name} is made of what it sees there"
            )

    @abstractmethod
    def prepare(self, model: nn.Module, origin: Origin) -> nn.Module:
        """A copy of the model as it has to be fine-tuned."""

    def is_prepared(self, model: nn.Module) -> bool:
        """False for a model that `prepare` would have changed before it was trained."""
        return True

    def as_prepared(self, model: nn.Module) -> Method:
        """The same method with every choice made as `prepare` made it for this model."""
        return self

    def plain(self, prepared: nn.Module) -> nn.Module:
        """The network without what `prepare` put into it.

        Raises:
            UncertaintyError: it would not be the network that was trained.
        """
        return prepared

    def observer(self, network: nn.Module) -> Observer | None:
        """What watches the weights of a prepared network while it trains; None for methods that watch nothing."""
        return None

    @abstractmethod
    def fit(self, trained: Trained) -> Members:
        """The members, from models that `prepare` made, or from plain ones where the method allows it.

        Raises:
            UncertaintyError: a stage was missed that the method cannot do without (names it).
        """

    @abstractmethod
    def restore(self, networks: Sequence[nn.Module], structure: Mapping[str, Any]) -> Members:
        """Members of the right shapes, their tensors still to be loaded, from what `Members.structure` told."""

    @abstractmethod
    def describe(self, model: nn.Module, origin: Origin) -> dict[str, object]:
        """The plan in plain values: what will be done to this model, and its `cost_line`."""


def cost_line(method: Method, samples: int, macs: int, dense_macs: int, stored_bytes: int) -> dict[str, object]:
    """What every method says of its cost.

    Args:
        samples: members.
        macs: of one image with all members.
        dense_macs: of one pass of the dense model.
        stored_bytes: of all parameters and buffers.
    """
    return {
        "method": method.name,
        "samples": samples,
        "macs": macs,
        "share_of_dense_pass": macs / dense_macs,
        "stored_bytes": stored_bytes,
        "trainings": method.networks,
    }


def describe_networks(
    method: Method, count: int, model: nn.Module, origin: Origin, *, more_macs: int = 0, more_bytes: int = 0
) -> dict[str, object]:
    """The cost of a method whose members are so many networks like `model`, each a pass of its own, and a bit more."""
    cost = measure_cost(model, origin.example(model, method.name).shape[1:])
    dense = origin.dense_cost.macs if origin.dense_cost else cost.macs
    return cost_line(method, count, count * cost.macs + more_macs, dense, count * cost.size_bytes + more_bytes)


def check_samples(samples: object, least: int = 1, why: str = "") -> None:
    """See that a number of members can be one.

    Raises:
        InputError: not a whole number, or too small.
    """
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < least:
        raise InputError(f"samples={samples}: expected a whole number of at least {least}{why}")
