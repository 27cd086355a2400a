"""An uncertain model as a description and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from compress_uq.calibration import CALIBRATORS
from compress_uq.cost import Cost
from compress_uq.decisions import ACCEPTANCE_RULES, SET_RULES
from compress_uq.errors import ArtifactError
from compress_uq.fitted import fitted_record, restore_fitted
from compress_uq.models import Architecture, versioned
from compress_uq.registry import Registry
from compress_uq.scores import SCORES
from compress_uq.stages import Origin
from compress_uq.structure import describe_structure, rebuild
from compress_uq.uncertain import UncertainModel
from compress_uq.uq import METHODS

__all__ = ["FORMAT_VERSION", "current", "describe", "describe_fitted", "restore", "tensors_of"]

FORMAT_VERSION = 2

_PARTS: dict[str, Registry[Any]] = {
    "calibrator": CALIBRATORS,
    "score": SCORES,
    "ood_score": SCORES,
    "acceptance": ACCEPTANCE_RULES,
    "sets": SET_RULES,
}
"""What an uncertain model holds besides its members, each restored by name."""


def tensors_of(model: UncertainModel) -> bytes:
    """All parameters and buffers, as a safetensors file."""
    state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    content: bytes = save_tensors(state)
    return content


def describe(model: UncertainModel, dense: nn.Module, architecture: Architecture | None) -> dict[str, Any]:
    """What the tensors do not say, for JSON.

    Args:
        dense: the module that the networks were pruned from.
        architecture: how it is built again; None where only its owner can.
    """
    return {
        "architecture": None if architecture is None else architecture.to_json(),
        "networks": [describe_structure(dense, network) for network in model.members.networks],
        "method": {"name": model.method.name, "options": vars(model.method)},
        "members": model.members.structure(),
        **describe_fitted(model),
    }


def describe_fitted(model: UncertainModel) -> dict[str, Any]:
    """The part of `describe` that a calibration changes."""
    fitted = {part: fitted_record(getattr(model, part)) for part in _PARTS}
    return {"format_version": FORMAT_VERSION, **fitted, "record": model.record, "origin": asdict(model.origin)}


def restore(structure: Mapping[str, Any], dense: nn.Module, tensors: bytes) -> UncertainModel:
    """The model again, in eval mode.

    Args:
        structure: what `describe` gave, as `current` reads it.
        dense: the module that the networks were pruned from, with any weights.
        tensors: what `tensors_of` gave.

    Raises:
        ArtifactError: the two do not fit each other.
    """
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in structure["method"]["options"].items()}
    method = METHODS[structure["method"]["name"]](**options)
    networks = [rebuild(dense, described).eval() for described in structure["networks"]]
    state = load_tensors(tensors)
    model = UncertainModel(
        method.restore(networks, structure["members"]),
        method,
        _origin(structure["origin"]),
        record=structure.get("record"),
        **{part: restore_fitted(registry, structure[part], state, f"{part}.") for part, registry in _PARTS.items()},
    )
    try:
        model.load_state_dict(versioned(model, state))
    except RuntimeError as error:
        raise ArtifactError(
            f"model.safetensors does not fit structure.json: {str(error).splitlines()[1].strip()}"
        ) from error
    return model


def current(structure: Mapping[str, Any]) -> Mapping[str, Any]:
    """A structure in today's form. Of format 1: one network, a calibrator, and nothing else that was fitted."""
    if structure["format_version"] > 1:
        members = structure["members"]
        if members.get("fidelity") is None:
            return structure
        found = {**members["found"], "fidelity": members["fidelity"]}
        return {**structure, "members": {**members, "found": found}}
    fitted = {"calibrator": {"name": structure["calibrator"], "options": {}}}
    return {**structure, "networks": [structure["network"]], **dict.fromkeys(_PARTS), **fitted}


def _origin(data: Mapping[str, Any]) -> Origin:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    cost = values.pop("dense_cost")
    return Origin(dense_cost=None if cost is None else Cost(**cost), **values)
