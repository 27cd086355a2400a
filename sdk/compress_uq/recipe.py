"""All that a run can be repeated from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compress_uq._version import __version__
from compress_uq.compression import Compressed
from compress_uq.data import Splits
from compress_uq.models import Architecture
from compress_uq.planning import CompressionPlan
from compress_uq.pruning import PruneResult
from compress_uq.shrinking import Shrunk

__all__ = ["recipe_of"]


def recipe_of(
    plan: CompressionPlan, compressed: Compressed, splits: Splits, architecture: Architecture | None
) -> dict[str, Any]:
    """Plain values: what was asked for, what was chosen on the way, and on which images."""
    info, networks, uncertain, config = splits.info, compressed.networks, compressed.model, plan.training
    pruned = networks[0].pruned
    resolved = info.augment if config.augment == "auto" else config.augment
    sizes = {p: len(s) for p in ("train", "calibration", "decision", "test") if (s := getattr(splits, p)) is not None}
    recipe = {
        "version": __version__,
        "architecture": None if architecture is None else architecture.to_json(),
        "data": {
            "name": Path(info.name).name,
            "images": sizes,
            "calibration": info.calibration,
            "mean": info.mean,
            "std": info.std,
            "ood": {name: len(dataset) for name, dataset in splits.ood.items()},  # type: ignore[arg-type]
            "validation_ood": {name: len(dataset) for name, dataset in splits.validation_ood.items()},  # type: ignore[arg-type]
        },
        "pruning": {
            **pruned.settings,
            "sparsity_reached": pruned.sparsity,
            "target_reached": None if pruned.target is None else pruned.target.reached,
            "epochs": len(pruned.history),
            "search": None if plan.search is None else plan.search.to_json(),
            "channels": _channels(pruned),
        },
        "members": [_member(network) for network in networks] if len(networks) > 1 else [],
        "uncertainty": {**plan.uncertainty, "options": vars(plan.method)},
        **asdict(plan.answers),
        "answers": {"score": uncertain.score.name, "ood_score": uncertain.ood_score.name, **uncertain.record},
        "training": {**asdict(config), "augment": resolved},
        "seed": config.seed,
        "calibrator": uncertain.calibrator.name,
        "calibration_choice": uncertain.calibrator.choice,
    }
    plain: dict[str, Any] = _plain(recipe)
    return plain


def _member(network: Shrunk) -> dict[str, Any]:
    """What tells a member of an ensemble from the others."""
    return {
        "seed": network.seed,
        "criterion": network.pruned.settings["criterion"],
        "perturbation": network.perturbation,
        "sparsity_reached": network.pruned.sparsity,
        "channels": _channels(network.pruned),
    }


def _channels(pruned: PruneResult) -> dict[str, list[int]]:
    return {layer.name: [layer.before, layer.after] for layer in pruned.layers}


def _plain(value: Any) -> Any:
    """Tuples as lists, so that a recipe equals its own JSON."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value
