"""Everything that can be named: what `compress-uq methods` prints."""

from __future__ import annotations

from typing import Any

from compress_uq.calibration import CALIBRATORS
from compress_uq.data import AUGMENTATIONS, DATASETS, MADE_SETS
from compress_uq.decisions import ACCEPTANCE_RULES, SET_RULES
from compress_uq.export import EXPORTERS, LAYOUTS, MEMBER_LAYOUTS, PRECISIONS, SCHEMES
from compress_uq.metrics import METRICS
from compress_uq.models import ARCHITECTURES
from compress_uq.pruning import CRITERIA, SCHEDULES
from compress_uq.registry import Registry
from compress_uq.scores import SCORES
from compress_uq.uq import METHODS

__all__ = ["REGISTRIES", "catalogue"]

REGISTRIES: dict[str, Registry[Any]] = {
    "criteria": CRITERIA,
    "schedules": SCHEDULES,
    "uq": METHODS,
    "calibrators": CALIBRATORS,
    "scores": SCORES,
    "acceptance_rules": ACCEPTANCE_RULES,
    "set_rules": SET_RULES,
    "metrics": METRICS,
    "exporters": EXPORTERS,
    "precisions": PRECISIONS,
    "quantizations": SCHEMES,
    "layouts": MEMBER_LAYOUTS,
    "inputs": LAYOUTS,
    "architectures": ARCHITECTURES,
    "datasets": DATASETS,
    "ood_sets": MADE_SETS,
    "augmentations": AUGMENTATIONS,
}


def catalogue() -> dict[str, list[dict[str, str]]]:
    """Every registry's entries: name, a line, and a source."""
    return {
        kind: [{"name": e.name, "summary": e.summary, "source": e.source} for e in registry]
        for kind, registry in REGISTRIES.items()
    }
