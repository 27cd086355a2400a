"""The smallest model within a budget: decided on held-out images, never on test."""

from __future__ import annotations

import contextlib
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from torch import nn

from compress_uq.config import TrainingConfig
from compress_uq.data import Augmentation, Splits
from compress_uq.errors import CalibrationError, DataError, InputError, PruningError, UnknownNameError
from compress_uq.held_out import held_out_figures
from compress_uq.progress import Progress, ProgressCallback, silent
from compress_uq.pruning import LARGEST_SHARE, PruningOptions
from compress_uq.shrinking import prune_and_finetune
from compress_uq.stages import ModelsOrResults, Origin, unpack_all
from compress_uq.steps import calibrate, fit_uncertainty
from compress_uq.uncertain import UncertainModel, as_given
from compress_uq.uq import Method

__all__ = ["Budget", "SearchResult", "Trial", "held_out_measures", "search_sparsity"]

MEASURES = ("accuracy_drop", "ece", "ause", "nll")
_FORM = re.compile(r"\s*(\w+)\s*<=\s*([-+.\deE]+)\s*")


@dataclass(frozen=True)
class Budget:
    """What a smaller model may cost in quality."""

    measure: str
    """`accuracy_drop` (share of images, dense minus compressed), `ece`, `ause` or `nll`."""
    limit: float

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise UnknownNameError("budget", self.measure, MEASURES)
        if not math.isfinite(self.limit):
            raise InputError(f"budget {self}: expected a finite limit")

    def __str__(self) -> str:
        return f"{self.measure}<={self.limit:g}"

    @classmethod
    def parse(cls, text: str) -> Budget:
        """From `accuracy_drop<=0.01`.

        Raises:
            InputError: another form, or a measure that is not known.
        """
        found = _FORM.fullmatch(text)
        if found is None:
            raise InputError(f"budget {text!r}: expected a measure and a limit, such as accuracy_drop<=0.01")
        return cls(found[1], float(found[2]))


@dataclass(frozen=True)
class Trial:
    """One size that was tried."""

    sparsity: float
    parameters_share: float
    macs_share: float
    measures: Mapping[str, float]
    holds: bool


@dataclass(frozen=True)
class SearchResult:
    """The largest sparsity that stays inside every budget, and all that was tried."""

    sparsity: float
    budgets: tuple[Budget, ...]
    trials: tuple[Trial, ...]
    epochs: int
    """Of fine-tuning in each trial; the chosen model gets more."""
    images: str
    """Where the measures come from, in words."""

    def to_json(self) -> dict[str, object]:
        """Plain values, for the recipe."""
        return {
            "sparsity": self.sparsity,
            "budgets": [str(budget) for budget in self.budgets],
            "trials": [{**asdict(trial), "measures": dict(trial.measures)} for trial in self.trials],
            "epochs": self.epochs,
            "images": self.images,
        }


def search_sparsity(
    model: ModelsOrResults,
    splits: Splits,
    budgets: Sequence[str | Budget],
    *,
    pruning: PruningOptions,
    method: Method,
    calibration: str = "temperature",
    training: TrainingConfig | None = None,
    augment: str | Augmentation = "auto",
    epochs: int = 2,
    trials: int = 5,
    largest: float = 0.95,
    progress: ProgressCallback = silent,
) -> SearchResult:
    """The largest sparsity whose quality stays inside the budgets after a short fine-tuning, by bisection.

    Each trial prunes, fine-tunes for `epochs`, fits the uncertainty, calibrates, and measures on the `decision` split,
    or on the calibration split, cross-fitted in two halves, where there is none. Bisection takes quality to fall as the
    model shrinks; the trials tell whether it did.

    Raises:
        PruningError: a size was given too, or no trial is inside the budgets (names the nearest miss).
        DataError: no held-out images.
    """
    wanted = tuple(Budget.parse(b) if isinstance(b, str) else b for b in budgets)
    if not wanted:
        raise InputError("no budget was given: expected some, such as accuracy_drop<=0.01")
    for name in ("sparsity", "target"):
        if pruning.get(name) is not None:
            raise PruningError(f"a budget and {name}={pruning[name]} were given: the budget decides the size")
    if trials < 1:
        raise InputError(f"trials={trials}: expected 1 or more")
    models, origin = unpack_all(model)
    method = method.of_models(len(models))
    config = replace(training or TrainingConfig(), epochs=epochs)
    before, images = held_out_measures(models, origin, splits, calibration, config, progress)
    if pruning.get("scope") == "global":
        largest = min(largest, LARGEST_SHARE)
    reason = ""
    tried: list[Trial] = []
    low, high = 0.0, largest
    for number in range(trials):
        sparsity = round((low + high) / 2, 4)
        progress(Progress("searching", number, trials, f"sparsity {sparsity}"))
        try:
            networks = prune_and_finetune(
                models, splits, pruning={**pruning, "sparsity": sparsity}, method=method, training=config,
                augment=augment, progress=progress,
            )  # fmt: skip
        except PruningError as error:
            if not tried:
                raise
            # So small a share leaves every layer whole: there is nothing between it and the sizes that were tried.
            reason = f" ({error})"
            break
        after, _ = _measures(
            fit_uncertainty([network.tuned for network in networks], splits, device=config.device),
            splits,
            calibration,
            config,
            progress,
        )
        after["accuracy_drop"] = before["accuracy"] - after.pop("accuracy")
        measured = {name: after[name] for name in MEASURES}
        holds = all(measured[budget.measure] <= budget.limit for budget in wanted)
        tried.append(
            Trial(
                sparsity,
                statistics.mean(n.pruned.after.parameters / n.pruned.before.parameters for n in networks),
                statistics.mean(n.pruned.after.macs / n.pruned.before.macs for n in networks),
                measured,
                holds,
            )
        )
        low, high = (sparsity, high) if holds else (low, sparsity)
    if not any(trial.holds for trial in tried):
        nearest = min(tried, key=lambda trial: trial.sparsity)
        missed = "; ".join(f"{b.measure} {nearest.measures[b.measure]:.4f}, budget {b}" for b in wanted)
        raise PruningError(
            f"no size was found within the budget: at sparsity {nearest.sparsity} {missed}; allow more, or search with "
            f"more epochs{reason}"
        )
    best = max((trial for trial in tried if trial.holds), key=lambda trial: trial.sparsity)
    return SearchResult(best.sparsity, wanted, tuple(tried), epochs, images)


def held_out_measures(
    models: Sequence[nn.Module], origin: Origin, splits: Splits, calibration: str, config: TrainingConfig,
    progress: ProgressCallback = silent,
) -> tuple[dict[str, float], str]:  # fmt: skip
    """Accuracy, NLL, ECE and AUSE of plain models on held-out images, calibrated, and which images those are.

    Raises:
        DataError: there are no held-out images.
    """
    return _measures(as_given(models, origin.of_data(splits)), splits, calibration, config, progress)


def _measures(
    model: UncertainModel, splits: Splits, calibration: str, config: TrainingConfig, progress: ProgressCallback
) -> tuple[dict[str, float], str]:
    """Figures on held-out images, calibrated, and which images those are."""
    with contextlib.suppress(CalibrationError):  # without a mistake there is no temperature, and nothing to mend
        model = calibrate(model, splits, method=calibration, device=config.device, progress=progress)
    figures, images = held_out_figures(model, splits, device=config.device, progress=progress)
    missing = [name for name in ("accuracy", "nll", "ece", "ause") if figures.get(name) is None]
    if missing:
        raise DataError(f"{missing[0]} cannot be measured: {images}")
    return {name: float(figures[name] or 0.0) for name in ("accuracy", "nll", "ece", "ause")}, images
