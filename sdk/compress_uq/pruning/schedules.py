"""When channels go: at once, step by step with training between, or from weights that are set back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from compress_uq.config import configured
from compress_uq.errors import PruningError, UnknownNameError
from compress_uq.registry import Entry, Registry

__all__ = ["SCHEDULES", "Iterative", "Lottery", "OneShot", "Schedule", "Step", "configured_schedule"]


@dataclass(frozen=True)
class Step:
    """One removal and what follows it."""

    fraction: float
    """How much of the whole removal is reached, in (0, 1]."""
    epochs: int = 0
    """Training after it; the last step leaves its training to fine-tuning."""
    rewind: bool = False
    """What is left is set back to earlier weights before it is trained."""
    criterion: str | None = None
    """Takes the place of the run's criterion."""


class Schedule(ABC):
    """How a removal is spread over a run; a frozen dataclass whose fields are its options."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def share(self) -> float:
        """Of a run's epochs, the share spent between removals; the rest is the fine-tuning after the last."""

    @property
    def trains(self) -> bool:
        """Whether anything is trained before the last removal is done."""
        return self.share > 0 or self.early_epochs > 0

    @property
    def rewinds_to(self) -> str | None:
        """`initial`, `early` or `random` where what is left is set back."""
        return None

    @property
    def early_epochs(self) -> int:
        """Epochs from the initial weights to the early ones."""
        return 0

    @abstractmethod
    def steps(self, epochs: int) -> tuple[Step, ...]:
        """The steps of a run that has `epochs` of training to spend between them."""


@dataclass(frozen=True)
class OneShot(Schedule):
    """Everything at once."""

    name: ClassVar[str] = "one-shot"

    @property
    def share(self) -> float:
        """See `Schedule`."""
        return 0.0

    def steps(self, epochs: int) -> tuple[Step, ...]:
        """One."""
        return (Step(1.0),)


@dataclass(frozen=True)
class Iterative(Schedule):
    """In several steps, counted from the original widths, with training after each (Han et al. 2015, section 3)."""

    name: ClassVar[str] = "iterative"
    count: int = 3
    curve: str | tuple[float, ...] = "linear"
    """`linear`; `cubic`, fast at first: 1 - (1 - t)^3 (Zhu and Gupta 2018, equation 1); or the fractions themselves."""
    first: str | None = None
    """Criterion of the first step, such as `random` for weights that were never trained (Aguettaz, Net2)."""

    def __post_init__(self) -> None:
        if not isinstance(self.count, int) or self.count < 2:
            raise PruningError(f"iterative schedule of {self.count} steps: expected a whole number, 2 or more")
        if isinstance(self.curve, str):
            if self.curve not in _CURVES:
                raise UnknownNameError("curve", self.curve, _CURVES)
        elif list(self.curve) != sorted(set(self.curve)) or not self.curve or self.curve[-1] != 1 or self.curve[0] <= 0:
            raise PruningError(f"curve={self.curve}: expected rising fractions above 0 that end at 1")

    @property
    def share(self) -> float:
        """See `Schedule`."""
        return 1 - 1 / len(self.fractions)

    @property
    def fractions(self) -> tuple[float, ...]:
        """Of the whole removal, reached after each step."""
        if not isinstance(self.curve, str):
            return self.curve
        return tuple(_CURVES[self.curve]((i + 1) / self.count) for i in range(self.count))

    def steps(self, epochs: int) -> tuple[Step, ...]:
        """One for each fraction."""
        trained = _spread(epochs, len(self.fractions) - 1)
        return tuple(
            Step(fraction, training, criterion=self.first if i == 0 else None)
            for i, (fraction, training) in enumerate(zip(self.fractions, (*trained, 0), strict=True))
        )


@dataclass(frozen=True)
class Lottery(Schedule):
    """The weights that stay are set back to what they were before training (Frankle and Carbin 2019, section 1)."""

    name: ClassVar[str] = "lottery"
    rounds: int = 1
    rewind: str = "initial"
    """`initial`: the first weights; `early`: those after `early` epochs of training from them (Frankle et al. 2020);
    `random`: drawn anew, the control of the hypothesis."""
    early: int = 1

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise PruningError(f"lottery schedule of {self.rounds} rounds: expected 1 or more")
        if self.rewind not in ("initial", "early", "random"):
            raise UnknownNameError("rewind", self.rewind, ("initial", "early", "random"))
        if self.early < 1:
            raise PruningError(f"early={self.early}: expected 1 epoch or more")

    @property
    def share(self) -> float:
        """See `Schedule`."""
        return 1 - 1 / self.rounds

    @property
    def rewinds_to(self) -> str | None:
        """See `Schedule`."""
        return self.rewind

    @property
    def early_epochs(self) -> int:
        """See `Schedule`."""
        return self.early if self.rewind == "early" else 0

    def steps(self, epochs: int) -> tuple[Step, ...]:
        """One for each round."""
        trained = _spread(epochs, self.rounds - 1)
        return tuple(Step((i + 1) / self.rounds, training, rewind=True) for i, training in enumerate((*trained, 0)))


def _spread(epochs: int, parts: int) -> list[int]:
    """Whole epochs as even as can be, the later parts longer."""
    return [epochs * (i + 1) // parts - epochs * i // parts for i in range(parts)]


_CURVES: dict[str, Callable[[float], float]] = {"linear": lambda t: t, "cubic": lambda t: 1 - (1 - t) ** 3}

SCHEDULES: Registry[type[Schedule]] = Registry(
    "schedule",
    Entry("one-shot", "everything at once, then fine-tuning", "Li 2017, section 3.4", OneShot),
    Entry("iterative", "in steps with fine-tuning between", "Han 2015, section 3", Iterative),
    Entry("lottery", "what is left is set back to weights from before training", "Frankle and Carbin 2019", Lottery),
)


def configured_schedule(name: str, options: Mapping[str, str]) -> Schedule:
    """A schedule by name, its options given as texts.

    Raises:
        UnknownNameError: no such schedule or option; names the nearest.
    """
    return configured(SCHEDULES[name], options)
