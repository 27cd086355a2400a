"""The stages of a run, from dense models to uncertain ones: what `compress` and studies share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from compress_uq.calibration import AUTO
from compress_uq.config import AnswerConfig, TrainingConfig
from compress_uq.data import Augmentation, Splits
from compress_uq.finishing import Finished, finish, finish_model
from compress_uq.progress import ProgressCallback, silent
from compress_uq.pruning import PruneResult, PruningOptions
from compress_uq.report import Evaluation, evaluate, uncalibrated
from compress_uq.shrinking import Shrunk, finetune_dense, prune_and_finetune, seconds_of
from compress_uq.stages import Origin
from compress_uq.uncertain import UncertainModel, as_given
from compress_uq.uq import Method

__all__ = ["Compressed", "Compression"]


@dataclass(frozen=True)
class Compressed:
    """An uncertain model, and the networks that it was made of."""

    model: UncertainModel
    networks: tuple[Shrunk, ...]

    @property
    def seconds(self) -> float:
        """What all training took."""
        return sum(network.seconds for network in self.networks)


@dataclass
class Compression:
    """What is the same in all stages of a run, and the warnings made on the way."""

    models: tuple[nn.Module, ...]
    """The dense models as they were given."""
    origin: Origin
    splits: Splits
    pruning: PruningOptions
    method: Method
    """Knows how many models there are (`Method.of_models`)."""
    answers: AnswerConfig
    training: TrainingConfig
    augment: str | Augmentation = "auto"
    progress: ProgressCallback = silent
    work_dir: Path | None = None
    warnings: list[str] = field(default_factory=list)

    def dense(self) -> UncertainModel:
        """The dense models as they were given."""
        return as_given(self.models, self.origin.of_data(self.splits))

    def dense_calibrated(self, compressed: Compressed) -> UncertainModel:
        """The same, calibrated on the same images as the compressed model, and by the calibrator that it has."""
        only_calibrated = AnswerConfig(calibration=self._alike(compressed).calibration)
        done = finish_model(
            self.dense(), self.splits, only_calibrated, name="dense_calibrated", device=self.training.device,
            progress=self.progress,
        )  # fmt: skip
        return self._noted(done)

    def compressed(self, pruned: Sequence[PruneResult] = ()) -> Compressed:
        """Pruned, fine-tuned, calibrated; see `prune_and_finetune`."""
        networks = prune_and_finetune(
            self.models, self.splits, pruning=self.pruning, method=self.method, training=self.training,
            augment=self.augment, pruned=pruned, progress=self.progress, work_dir=self.work_dir,
        )  # fmt: skip
        done = finish(
            [network.tuned for network in networks], self.splits, self.answers, name="compressed",
            device=self.training.device, progress=self.progress,
        )  # fmt: skip
        return Compressed(self._noted(done), networks)

    def control(self, compressed: Compressed) -> tuple[UncertainModel, float]:
        """The dense models given the same training and uncertainty, and the seconds that it took."""
        # It drops where the compressed model does, whatever that costs on the dense one.
        first = compressed.networks[0]
        tuned = finetune_dense(
            self.models, first.pruned.origin, self.splits, method=self.method.as_prepared(first.tuned.model),
            training=self.training, augment=self.augment, progress=self.progress, work_dir=self.work_dir,
        )  # fmt: skip
        done = finish(
            tuned, self.splits, self._alike(compressed), name="control", device=self.training.device,
            progress=self.progress,
        )  # fmt: skip
        return self._noted(done), seconds_of(*tuned)

    def _alike(self, compressed: Compressed) -> AnswerConfig:
        """What to ask of a model that is compared with the compressed one: the same, also where that was chosen."""
        if self.answers.calibration != AUTO:
            return self.answers
        return replace(self.answers, calibration=compressed.model.calibrator.name)

    def measured(self, model: UncertainModel, stage: str) -> Evaluation:
        """Its figures on test."""
        return evaluate(model, self.splits, device=self.training.device, progress=self.progress, stage=stage)

    def uncalibrated(self, compressed: Compressed) -> Evaluation | None:
        """Figures on test of the compressed model as its members give them; None where nothing calibrates it."""
        return uncalibrated(compressed.model, self.splits, device=self.training.device, progress=self.progress)

    def _noted(self, done: Finished) -> UncertainModel:
        self.warnings.extend(done.warnings)
        return done.model
