"""How much each layer bears: one group of channels pruned at a time, measured on held-out images."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from compress_uq.config import TrainingConfig
from compress_uq.data import Splits
from compress_uq.errors import InputError, PruningError
from compress_uq.progress import Progress, ProgressCallback, silent
from compress_uq.pruning import PruningOptions, prunable_layers, prune, resolve_criterion
from compress_uq.report import layer_pages
from compress_uq.search import held_out_measures
from compress_uq.stages import ModelOrResult, unpack
from compress_uq.storage import replace_directory

__all__ = ["LayerTrial", "Sensitivity", "sensitivity"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerTrial:
    """One group of channels pruned alone, without training."""

    layer: str
    channels: int
    ratio: float
    measures: Mapping[str, float]
    """`accuracy`, `nll`, `ece`, `ause`."""


@dataclass(frozen=True)
class Sensitivity:
    """How much each group of channels bears."""

    dense: Mapping[str, float]
    trials: tuple[LayerTrial, ...]
    images: str
    """Where the measures come from, in words."""

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        trials = [{**asdict(trial), "measures": dict(trial.measures)} for trial in self.trials]
        return {"dense": dict(self.dense), "trials": trials, "images": self.images}

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write `sensitivity.md`, `.csv`, `.json` and `.png` to a new folder.

        Raises:
            ArtifactError: the folder is there and may not be replaced, or cannot be written.
        """
        rows = [{"layer": t.layer, "channels": t.channels, "ratio": t.ratio, **t.measures} for t in self.trials]
        with replace_directory(folder, overwrite=overwrite) as inside:
            (inside / "sensitivity.json").write_text(json.dumps(self.to_json(), indent=2))
            for suffix, content in layer_pages(self.dense, rows, self.images).items():
                (inside / f"sensitivity.{suffix}").write_bytes(content)


def sensitivity(
    model: ModelOrResult,
    splits: Splits,
    *,
    ratios: Sequence[float] = (0.25, 0.5, 0.75),
    pruning: PruningOptions | None = None,
    calibration: str = "temperature",
    training: TrainingConfig | None = None,
    progress: ProgressCallback = silent,
) -> Sensitivity:
    """NLL, ECE, AUSE and accuracy on held-out images with one group of channels pruned at a time, not fine-tuned.

    Layers that lose channels together are one group, so that no layer is blamed for another. Batch norm is
    recalibrated where there is a `train` split. A ratio that takes no channel of a layer has no row.

    Raises:
        InputError: a ratio that is not a share, or no held-out images.
        PruningError: nothing can be pruned.
    """
    for ratio in ratios:
        if not 0 < ratio < 1:
            raise InputError(f"ratio {ratio}: expected a share above 0 and below 1, such as 0.5")
    options: PruningOptions = {"round_to": 1, **(pruning or {})}
    for name in ("sparsity", "target"):
        if options.get(name) is not None:
            raise InputError(f"{name}={options[name]} was given: sensitivity prunes each layer by the ratios")
    rule = resolve_criterion(options.get("criterion", "l1"))
    if rule.trains:
        raise PruningError(
            f"criterion {rule.name!r} trains the model, which would hide what a layer bears: take another"
        )
    dense, origin = unpack(model)
    config = training or TrainingConfig()
    before, images = held_out_measures((dense,), origin, splits, calibration, config, progress)
    layers = prunable_layers(dense, splits.example(), keep=options.get("keep", ()))
    found = []
    for number, (name, channels) in enumerate(layers.items()):
        for ratio in ratios:
            progress(Progress("sensitivity", number, len(layers), f"{name} at {ratio}"))
            alone: PruningOptions = {**options, "sparsity": {name: ratio}}
            try:
                result = prune(dense, splits.example(), splits=splits, training=config, seed=config.seed, **alone)
            except PruningError as error:
                _LOG.info("%s at %s is left out: %s", name, ratio, error)
                continue
            measured, _ = held_out_measures((result.model,), result.origin, splits, calibration, config, progress)
            found.append(LayerTrial(name, channels, ratio, measured))
    if not found:
        raise PruningError(
            f"nothing was pruned: ratios={list(ratios)} remove no channel of any layer; give larger ones"
        )
    return Sensitivity(before, tuple(found), images)
