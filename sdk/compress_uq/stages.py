"""What travels between the stages: a module, and what is known of where it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from compress_uq.cost import Cost
from compress_uq.data import DataInfo, Splits
from compress_uq.errors import InputError

__all__ = ["AsGiven", "ModelOrResult", "ModelsOrResults", "Origin", "StageResult", "unpack", "unpack_all"]


@dataclass(frozen=True)
class Origin:
    """What the next stage needs to know and a bare module does not tell."""

    input_shape: tuple[int, ...] | None = None
    """(C, H, W) of one image."""
    dense_cost: Cost | None = None
    """The cost of the model before pruning."""
    labels: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    """Normalisation of the images, of pixels in 0..1; it goes into the exported file."""
    data: str | None = None
    """Name of the data set."""
    reserved: str | None = None
    """Fingerprint of the data a fifth of whose test split went into calibration; no figure may use that fifth."""

    def of_data(self, splits: Splits) -> Origin:
        """The same, with what the splits know."""
        info = splits.info
        shape = self.input_shape or tuple(splits.example().shape[1:])
        return replace(
            self,
            input_shape=shape,
            labels=info.labels or self.labels,
            mean=info.mean or self.mean,
            std=info.std or self.std,
            data=self.data if info.name == DataInfo.name else Path(info.name).name,
            reserved=info.fingerprint if info.calibration_from_test else self.reserved,
        )

    def example(self, model: nn.Module, stage: str, images: int = 1) -> Tensor:
        """Images of the right shape, drawn from a fixed seed, on the model's device.

        Raises:
            InputError: the shape is not known.
        """
        if self.input_shape is None:
            raise InputError(
                f"{stage} needs the shape of an image: pass example_inputs= (a batch), or an earlier stage's result"
            )
        first = next(model.parameters(), torch.zeros(0))
        batch = torch.randn(images, *self.input_shape, generator=torch.Generator().manual_seed(0))
        return batch.to(first.device, first.dtype)


@runtime_checkable
class StageResult(Protocol):
    """Any stage's frozen result."""

    @property
    def model(self) -> nn.Module:
        """The module that the stage made."""

    @property
    def origin(self) -> Origin:
        """Where it came from."""


ModelOrResult = nn.Module | StageResult
ModelsOrResults = ModelOrResult | Sequence[ModelOrResult]
"""One, or the members of an ensemble."""


@dataclass(frozen=True)
class AsGiven:
    """A model to which nothing was done, as a stage's result."""

    model: nn.Module
    origin: Origin


def unpack(given: ModelOrResult, example_inputs: Tensor | None = None) -> tuple[nn.Module, Origin]:
    """The module and its origin; `example_inputs` (N, C, H, W) tells the shape where the module alone does not.

    Raises:
        InputError: neither a module nor a stage's result.
    """
    origin: Origin
    if isinstance(given, nn.Module):
        model, known = given, getattr(given, "origin", None)
        origin = known if isinstance(known, Origin) else Origin()
    elif isinstance(given, StageResult):
        model, origin = given.model, given.origin
    else:
        raise InputError(f"a {type(given).__name__} was given: expected a torch.nn.Module or an earlier stage's result")
    if example_inputs is not None:
        origin = replace(origin, input_shape=tuple(example_inputs.shape[1:]))
    return model, origin


def unpack_all(given: ModelsOrResults, example_inputs: Tensor | None = None) -> tuple[tuple[nn.Module, ...], Origin]:
    """The modules and the origin that they share: the first one's, with what only others know.

    Raises:
        InputError: nothing was given, something else than modules and results, or models that answer for other labels
            or take images of another shape.
    """
    unpacked = [unpack(each, example_inputs) for each in (given if isinstance(given, Sequence) else (given,))]
    if not unpacked:
        raise InputError("no model was given: expected one, or a list of the members of an ensemble")
    origin = unpacked[0][1]
    for name, what in (("labels", "labels"), ("input_shape", "images of shape")):
        known = {number: value for number, (_, o) in enumerate(unpacked, 1) if (value := getattr(o, name)) is not None}
        for number, value in known.items():
            first = next(iter(known))
            if value != known[first]:
                raise InputError(
                    f"model {first} takes or answers {what} {known[first]} and model {number} {value}: the members of "
                    "an ensemble have the same"
                )
        origin = replace(origin, **{name: next(iter(known.values()), None)})
    return tuple(module for module, _ in unpacked), origin
