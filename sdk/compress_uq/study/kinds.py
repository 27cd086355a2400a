"""The kinds of study by name."""

from __future__ import annotations

from typing import Any

from compress_uq.registry import Entry, Registry
from compress_uq.study.compress import CompressKind
from compress_uq.study.from_scratch import FromScratchKind
from compress_uq.study.kind import Kind
from compress_uq.study.node_removal import NodeRemovalKind

__all__ = ["KINDS"]

KINDS: Registry[Kind[Any]] = Registry(
    "kind of study",
    Entry("compress", "prune, fine-tune, calibrate and measure a model", "", CompressKind()),
    Entry("train", "train a network with an uncertainty method and measure it, unpruned", "", FromScratchKind()),
    Entry(
        "node-removal",
        "take nodes out of one layer of a trained network, and measure",
        "Charpentier 2020",
        NodeRemovalKind(),
    ),
)
