"""What a run can be repeated from: frozen dataclasses that survive a trip through TOML."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_args, get_type_hints

from compress_uq.errors import InputError, UnknownNameError
from compress_uq.fitted import Plain

__all__ = ["AnswerConfig", "Guarantees", "TrainingConfig", "configured", "from_toml", "to_toml"]

T = TypeVar("T")


@dataclass(frozen=True)
class TrainingConfig:
    """How a network is trained or fine-tuned."""

    epochs: int = 15
    lr: float = 0.05
    """Peak learning rate."""
    batch_size: int = 128
    optimizer: str = "sgd"
    """`sgd` (Nesterov momentum 0.9), `adam` (AdamW: decay apart from the gradient) or `adam-l2` (within it)."""
    weight_decay: float = 5e-4
    lr_schedule: str = "auto"
    """`one-cycle` (up for a quarter, then down), `cosine`, `constant`, `hold` (down to half, then held), `step`
    (tenfold down after each third), or `auto`: what the uncertainty method wants, one-cycle where it wants nothing."""
    augment: str = "auto"
    """A name of `compress-uq methods`, or `auto`: what suits the data set."""
    class_weights: str | tuple[float, ...] = "none"
    """`none`, `balanced` (inverse frequency), or a weight per class."""
    distillation_weight: float = 0.9
    """Share of the distillation loss; the rest is cross-entropy with the labels. Used only with a teacher."""
    distillation_temperature: float = 4.0
    workers: int = 0
    seed: int = 0
    device: str = "auto"
    """`auto`, `cpu` or `cuda[:i]`."""

    def __post_init__(self) -> None:
        _check("epochs", self.epochs, self.epochs >= 0, "0 or more")
        _check("lr", self.lr, math.isfinite(self.lr) and self.lr > 0, "above 0")
        _check("batch_size", self.batch_size, self.batch_size >= 1, "1 or more")
        _check("weight_decay", self.weight_decay, self.weight_decay >= 0, "0 or more")
        weight = self.distillation_weight
        _check("distillation_weight", weight, 0 <= weight <= 1, "between 0 and 1")
        temperature = self.distillation_temperature
        _check("distillation_temperature", temperature, temperature > 0, "above 0")
        _check("workers", self.workers, self.workers >= 0, "0 or more")
        _choice("optimizer", self.optimizer, ("sgd", "adam", "adam-l2"))
        _choice("lr_schedule", self.lr_schedule, ("auto", "one-cycle", "cosine", "constant", "hold", "step"))
        if isinstance(self.class_weights, str):
            _choice("class_weights", self.class_weights, ("none", "balanced"))
        elif any(not math.isfinite(w) or w < 0 for w in self.class_weights) or not any(self.class_weights):
            raise InputError(f"class_weights={self.class_weights}: expected weights of 0 or more, not all 0")


@dataclass(frozen=True)
class Guarantees:
    """What decision rules are to promise."""

    risk: float | None = None
    """Largest share of wrong answers among the accepted ones; None accepts nothing and refuses nothing."""
    coverage: float | None = None
    """How often the truth is in the prediction set at least; None names no sets."""
    delta: float = 0.05
    """Probability that the risk is exceeded after all."""
    sets: str = "lac"
    """How prediction sets are made: `lac` or `raps`."""
    options: Mapping[str, Plain] | None = None
    """Of the set rule, such as `{"penalty": 0.1, "free": 3}` for `raps`."""

    @property
    def asked(self) -> tuple[str, ...]:
        """The parts of a model that they need: `acceptance`, `sets`, or both."""
        return tuple(part for part, value in (("acceptance", self.risk), ("sets", self.coverage)) if value is not None)


@dataclass(frozen=True)
class AnswerConfig:
    """What a prediction says besides the probabilities as the members give them."""

    calibration: str = "temperature"
    """A calibrator's name."""
    score: str = "confidence"
    """Behind `uncertainty`: a score's name."""
    ood_score: str = "entropy"
    """Behind `ood_score`: a score's name, or `auto`, which chooses on out-of-distribution sets of its own."""
    risk: float | None = None
    """Largest share of wrong answers among the accepted ones; None accepts nothing and refuses nothing."""
    coverage: float | None = None
    """How often the truth is in the prediction set at least; None names no sets."""
    risk_delta: float = 0.05
    """Probability that the risk is exceeded after all."""
    sets: str = "lac"
    """How prediction sets are made: `lac` or `raps`."""

    @property
    def guarantees(self) -> Guarantees:
        """What the decision rules are to promise."""
        return Guarantees(risk=self.risk, coverage=self.coverage, delta=self.risk_delta, sets=self.sets)

    @property
    def rules(self) -> int:
        """How many decision rules are asked for."""
        return len(self.guarantees.asked)


def _check(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise InputError(f"{name}={value}: expected {expected}")


def _choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UnknownNameError(name, value, known)


def configured(kind: type[T], texts: Mapping[str, str]) -> T:
    """A dataclass of options from texts, each read as the type of the field's default; commas separate a sequence.

    Raises:
        UnknownNameError: a name that is not a field; names the nearest.
        InputError: a text that cannot be read.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, text in texts.items():
        if not defaults:
            raise InputError(f"{name}={text}: {getattr(kind, 'name', kind.__name__)} has no options")
        if name not in defaults:
            raise UnknownNameError(f"option of {getattr(kind, 'name', kind.__name__)}", name, defaults)
        values[name] = _read(name, text, defaults[name], hints[name])
    return kind(**values)


def _read(name: str, text: str, default: Any, hint: Any) -> Any:
    if not isinstance(default, int | float) and float in get_args(hint):  # a number, or a word in its place
        with contextlib.suppress(ValueError):
            return float(text)
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(default, int | float):
            return type(default)(text)
        parts = text.split(",")
        return tuple(float(part) for part in parts) if len(parts) > 1 else text
    except (ValueError, KeyError) as error:
        kind = {bool: "true or false", int: "a whole number"}.get(type(default), "a number")
        raise InputError(f"{name}={text}: expected {kind}, such as {default}") from error


def to_toml(config: Any) -> str:
    """A flat frozen dataclass as TOML; fields that are None are left out."""
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return "".join(f"{name} = {_toml_value(value)}\n" for name, value in given.items() if value is not None)


def from_toml(kind: type[T], text: str) -> T:
    """The dataclass that `to_toml` wrote.

    Raises:
        InputError: not TOML, or a key that the dataclass does not have (names the nearest).
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"not valid TOML: {error}") from error
    fields = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in data:
        if name not in fields:
            raise UnknownNameError(f"key of {kind.__name__}", name, fields)
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in data.items()})


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    # JSON's strings, and Python's numbers, are TOML's.
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
