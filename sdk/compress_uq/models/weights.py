"""Tensors put into a model, or what keeps them out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from compress_uq.errors import ModelError
from compress_uq.models.layers import ChannelSelect

__all__ = ["fit_weights", "refuse_non_finite", "versioned"]


def fit_weights(model: nn.Module, state: Mapping[str, Tensor], file: Path, reference: str) -> None:
    """Load weights into a model, or name the first thing that does not fit and both shapes.

    Raises:
        ModelError: a tensor is missing, left over, or of another shape.
    """
    wanted = model.state_dict()
    for name, tensor in wanted.items():
        if name not in state:
            if name.endswith("num_batches_tracked") or _without_weights(model, name):
                continue
            raise ModelError(
                f"{file} does not fit {reference}: {name} {tuple(tensor.shape)} is not in the file"
                + _nearest_shape(tensor, state)
            )
        if state[name].shape != tensor.shape:
            raise ModelError(
                f"{file} does not fit {reference}: {name} is {tuple(state[name].shape)} in the file "
                f"and {tuple(tensor.shape)} in the model"
            )
    extra = next((name for name in state if name not in wanted), None)
    if extra is not None:
        raise ModelError(
            f"{file} does not fit {reference}: {extra} {tuple(state[extra].shape)} is in the file and not in the model"
        )
    model.load_state_dict(versioned(model, state), strict=False)


def versioned(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as of the model's own version: files of tensors do not tell it, and some modules ask."""
    state = OrderedDict(state)
    state._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    return state


def _without_weights(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), ChannelSelect)


def _nearest_shape(tensor: Tensor, state: Mapping[str, Tensor]) -> str:
    first = next(iter(state))
    return f" (which starts with {first} {tuple(state[first].shape)})"


def refuse_non_finite(model: nn.Module, name_of_model: str | Path) -> None:
    """Refuse damaged weights.

    Raises:
        ModelError: a tensor holds NaN or infinity; names it.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{name_of_model}: {name} holds NaN or infinite values: the weights are damaged")
