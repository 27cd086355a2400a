"""What a pruned network looks like beside its dense architecture: shapes and sizes, enough to rebuild it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from compress_uq.errors import ArtifactError

__all__ = ["describe_structure", "differing_tensor", "rebuild"]


def describe_structure(dense: nn.Module, pruned: nn.Module) -> dict[str, Any]:
    """Every tensor's shape, and every integer attribute (channels, groups, features) that pruning changed.

    Works for any architecture: what differs between two modules of one class is what has to be set again.
    """
    changed: dict[str, dict[str, Any]] = {}
    before = dict(dense.named_modules())
    for name, module in pruned.named_modules():
        differing = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in vars(module).items()
            if _is_size(value) and getattr(before[name], key) != value
        }
        if differing:
            changed[name] = differing
    tensors = {name: list(value.shape) for name, value in pruned.state_dict().items()}
    frozen = sorted(name for name, p in pruned.named_parameters() if not p.requires_grad)
    return {"tensors": tensors, "attributes": changed, "frozen": frozen}


def rebuild(dense: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
    """A copy of the dense module cut to the described shapes; its tensors still have to be loaded.

    Raises:
        ArtifactError: the module is not the architecture that was described.
    """
    network = copy.deepcopy(dense)
    state = network.state_dict()
    if set(state) != set(structure["tensors"]):
        differing = sorted(set(state) ^ set(structure["tensors"]))[0]
        raise ArtifactError(
            f"the model is not the architecture that was compressed: {differing} is in one of them only"
        )
    for name, shape in structure["tensors"].items():
        if list(state[name].shape) == shape:
            continue
        owner_name, _, attribute = name.rpartition(".")
        owner = network.get_submodule(owner_name)
        empty = torch.zeros(shape, dtype=state[name].dtype)
        if attribute in owner._parameters:
            owner.register_parameter(attribute, nn.Parameter(empty))
        else:
            setattr(owner, attribute, empty)
    for name, attributes in structure["attributes"].items():
        for key, value in attributes.items():
            setattr(network.get_submodule(name), key, tuple(value) if isinstance(value, list) else value)
    return network


def differing_tensor(
    one: nn.Module, other: nn.Module
) -> tuple[str, tuple[int, ...] | None, tuple[int, ...] | None] | None:
    """The first tensor that two models do not share in name and shape, with both shapes; None where they agree."""
    shapes = [{name: tuple(value.shape) for name, value in model.state_dict().items()} for model in (one, other)]
    names = (name for name in {**shapes[1], **shapes[0]} if shapes[0].get(name) != shapes[1].get(name))
    return next(((name, shapes[0].get(name), shapes[1].get(name)) for name in names), None)


def _is_size(value: object) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (isinstance(value, tuple) and bool(value) and all(type(v) is int for v in value))
