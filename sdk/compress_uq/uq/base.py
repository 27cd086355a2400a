"""What an uncertainty method is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from compress_uq.cost import measure_cost
from compress_uq.data import ImageDataset
from compress_uq.errors import UncertaintyError
from compress_uq.stages import Origin
from compress_uq.training import Observer
from compress_uq.uq.members import Members
from compress_uq.uq.sites import find_head

__all__ = ["Method", "Trained", "describe_networks"]


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

    def training_images(self, train: ImageDataset, seed: int) -> ImageDataset:
        """The images that a network is trained on whose training has this seed."""
        return train

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
        """The plan in plain values: what will be done to this model, and what a prediction will cost."""


def describe_networks(method: str, count: int, model: nn.Module, origin: Origin) -> dict[str, object]:
    """The plan of a method whose members are so many networks like `model`, each a pass of its own."""
    cost = measure_cost(model, origin.example(model, method).shape[1:])
    dense = origin.dense_cost.macs if origin.dense_cost else cost.macs
    return {
        "method": method,
        "samples": count,
        "macs": count * cost.macs,
        "share_of_dense_pass": count * cost.macs / dense,
        "stored_bytes": count * cost.size_bytes,
    }
