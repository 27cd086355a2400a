"""`compress-uq demo`: the whole story on data that comes with scikit-learn."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import compress_uq as cuq
from compress_uq_cli.console import note

__all__ = ["demo"]

_TRAIN = (
    "compress-uq train --arch compress-uq:cnn --arch-option widths=32,64 --data digits "
    "--epochs 3 --lr 0.02 --out model.pt --overwrite"
)
_PRUNE = "compress-uq prune model.pt --sparsity 0.6 --uq mc-dropout"


def demo() -> None:
    """Train a small dense model on scikit-learn's digits, then prune it; leaves model.pt and model-compressed/."""
    from compress_uq_cli.main import app

    earlier = Path("model-compressed")
    cuq.Bundle.refuse_existing(earlier, overwrite=True)
    if earlier.exists():
        shutil.rmtree(earlier)
    for line in (_TRAIN, _PRUNE):
        note(f"\n$ {line}")
        app(args=shlex.split(line)[1:], standalone_mode=False)
