"""A study's file: its runs, its tables and plots, and the choice it makes."""

from __future__ import annotations

import dataclasses
import itertools
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from compress_uq.errors import InputError, UnknownNameError
from compress_uq.study.kind import Kind
from compress_uq.study.kinds import KINDS
from compress_uq.study.values import conform, to_name

__all__ = ["Choice", "Plot", "Study", "Table", "read_study"]

T = TypeVar("T")


@dataclass(frozen=True)
class Table:
    """One table: a row for each combination of the `rows`, and a column for each measure and value of `columns`."""

    name: str
    rows: tuple[str, ...]
    measures: tuple[str, ...]
    columns: str | None = None
    where: Mapping[str, Any] = field(default_factory=dict)
    """Settings that a run has to have to be counted; a list of values allows each of them."""


@dataclass(frozen=True)
class Plot:
    """One picture: `y` against `x`, a line for each combination of the `lines`."""

    name: str
    x: str
    y: str
    lines: tuple[str, ...]
    where: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """Of the combinations that keep a bound on held-out data, the one that is preferred."""

    measure: str
    at_most: float | None = None
    at_least: float | None = None
    prefer: str | None = None
    """A setting or a measure, by default `measure` itself."""
    where: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.at_most is not None and self.at_least is not None:
            raise InputError("choose has at-most and at-least: expected one bound")


@dataclass(frozen=True)
class Study:
    """A grid of runs and what becomes of their results."""

    name: str
    kind: str
    runs: tuple[Mapping[str, Any], ...]
    """The settings of each run, defaults included."""
    axes: tuple[str, ...]
    """Settings that the grid varies."""
    repeats: tuple[str, ...]
    """Axes over which means and standard deviations are taken."""
    tables: tuple[Table, ...]
    plots: tuple[Plot, ...]
    choice: Choice | None

    @property
    def varied(self) -> tuple[str, ...]:
        """The axes that tell one combination from another."""
        return tuple(axis for axis in self.axes if axis not in self.repeats)


def read_study(path: str | os.PathLike[str]) -> Study:
    """A study's file.

    Raises:
        InputError: missing, not TOML, without a grid, or a value that cannot be.
        UnknownNameError: a key, setting or measure that is not known; names the nearest.
    """
    file = Path(path)
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not TOML: {error}") from error
    try:
        return _study(file.stem, content)
    except UnknownNameError:
        raise
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def _study(stem: str, content: Mapping[str, Any]) -> Study:
    _known("section", content, ("study", "defaults", "grid", "tables", "plots", "choose"))
    head = _section(content, "study")
    _known("key of [study]", head, ("kind", "name", "repeats"))
    name = conform("study name", head.get("name", stem), str)
    kind_name = conform("study kind", head.get("kind", "compress"), str)
    kind = KINDS[kind_name]
    defaults = _settings("defaults", _section(content, "defaults"), kind)
    grids = [_axes(grid, kind) for grid in _sections(content, "grid")]
    if not any(grids):
        raise InputError("there is no grid: give [grid] at least one list, such as sparsity = [0.3, 0.6]")
    axes = tuple(dict.fromkeys(axis for grid in grids for axis in grid))
    repeats = tuple(_settings("study repeats", dict.fromkeys(_repeats(head)), kind))
    runs = tuple(
        {**defaults, **dict(zip(grid, values, strict=True))}
        for grid in grids
        for values in itertools.product(*grid.values())
    )
    study = Study(name, kind_name, runs, axes, repeats, (), (), None)
    tables = [_view(Table, "tables", t, study, kind) for t in _sections(content, "tables")]
    plots = [_view(Plot, "plots", p, study, kind) for p in _sections(content, "plots")]
    choice = _choice(_section(content, "choose"), study, kind) if "choose" in content else None
    return dataclasses.replace(
        study,
        tables=tuple(tables or [Table("all", study.varied, kind.shown)]),
        plots=tuple(plots or _default_plots(study, kind)),
        choice=choice,
    )


def _repeats(head: Mapping[str, Any]) -> tuple[str, ...]:
    names: tuple[str, ...] = conform("study repeats", head.get("repeats", ["seed"]), tuple[str, ...])
    return names


def _section(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = content.get(name, {})
    if not isinstance(value, Mapping):
        raise InputError(f"{name} = {value!r}: expected a section [{name}]")
    return value


def _sections(content: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """`[name]` once, or `[[name]]` several times."""
    value = content.get(name, [])
    listed = value if isinstance(value, list) else [value]
    if not all(isinstance(item, Mapping) for item in listed):
        raise InputError(f"{name} = {value!r}: expected sections [[{name}]]")
    return listed


def _known(what: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            raise UnknownNameError(what, key, known)


def _settings(where: str, given: Mapping[str, Any], kind: Kind[Any]) -> dict[str, Any]:
    for key in given:
        if to_name(key) not in kind.settings:
            raise UnknownNameError(f"setting in [{where}]", key, (s.replace("_", "-") for s in kind.settings))
    return {to_name(key): value for key, value in given.items()}


def _axes(given: Mapping[str, Any], kind: Kind[Any]) -> dict[str, list[Any]]:
    axes = _settings("grid", given, kind)
    for name, values in axes.items():
        if not isinstance(values, list):
            raise InputError(f"{name} = {values!r} in [grid]: expected a list; a single value belongs in [defaults]")
        if not values:
            raise InputError(f"{name} = [] in [grid]: expected at least one value")
    return axes


def _view(view: type[T], section: str, given: Mapping[str, Any], study: Study, kind: Kind[Any]) -> T:
    """A table or a plot; what it leaves out is what the study varies, or the kind shows."""
    hints = get_type_hints(view)
    for key in given:
        if key not in hints:
            raise UnknownNameError(f"key of [[{section}]]", key, hints)
    values = {key: conform(f"{section} {key}", value, hints[key]) for key, value in given.items()}
    values = {key: _spelled(key, value) for key, value in values.items()}
    values.setdefault("name", section)
    _of_kind(values.get("where", {}), study, section)
    fixed = {axis for axis, value in values.get("where", {}).items() if not isinstance(value, list)}
    free = [axis for axis in study.varied if axis not in fixed]
    named = (_complete_table if view is Table else _complete_plot)(values, free, study, kind)
    for axis in named:
        if axis not in study.axes:
            raise UnknownNameError(f"axis in [[{section}]]", axis, study.axes)
    for axis in free:
        if axis not in named:
            raise InputError(
                f"[[{section}]] {values['name']!r} leaves out the axis {axis!r}, and means are taken over "
                f"{', '.join(study.repeats) or 'nothing'} only: name it there, fix it in where, or add it to repeats"
            )
    return view(**values)


def _complete_table(values: dict[str, Any], free: list[str], study: Study, kind: Kind[Any]) -> list[str]:
    """What a table leaves out; the axes that tell its cells apart."""
    columns = [values["columns"]] if "columns" in values else []
    values.setdefault("measures", kind.shown)
    values.setdefault("rows", tuple(axis for axis in free if axis not in columns))
    _measures(values["measures"], kind)
    return [*values["rows"], *columns]


def _complete_plot(values: dict[str, Any], free: list[str], study: Study, kind: Kind[Any]) -> list[str]:
    """What a plot leaves out; the axes that tell its points apart, along a line too where x is a measure."""
    if "y" not in values:
        raise InputError(f"[[plots]] needs y, a measure such as {kind.shown[0]}")
    x = values.setdefault("x", kind.axis)
    along = x if x in study.axes else kind.axis
    values.setdefault("lines", tuple(axis for axis in free if axis != along))
    _measures([values["y"], *([] if x in study.axes else [x])], kind)
    return [*values["lines"], *([x] if x in study.axes else [axis for axis in free if axis not in values["lines"]])]


def _spelled(key: str, value: Any) -> Any:
    """Settings and measures inside a view as Python spells them."""
    if key == "name" or value is None:
        return value
    if isinstance(value, Mapping):
        return {to_name(k): v for k, v in value.items()}
    return to_name(value) if isinstance(value, str) else tuple(to_name(v) for v in value)


def _of_kind(where: Mapping[str, Any], study: Study, section: str) -> None:
    for axis in where:
        if axis not in study.axes:
            raise UnknownNameError(f"axis in where of [[{section}]]", axis, study.axes)


def _measures(names: Sequence[str], kind: Kind[Any]) -> None:
    for name in names:
        if name not in kind.measures:
            raise UnknownNameError("measure", name, kind.measures)


def _choice(given: Mapping[str, Any], study: Study, kind: Kind[Any]) -> Choice:
    hints = get_type_hints(Choice)
    values: dict[str, Any] = {}
    for key, value in given.items():
        if to_name(key) not in hints:
            raise UnknownNameError("key of [choose]", key, (h.replace("_", "-") for h in hints))
        values[to_name(key)] = conform(f"choose {key}", value, hints[to_name(key)])
    if "measure" not in values:
        raise InputError("[choose] needs measure, such as ece")
    values = {key: value if isinstance(value, float) else _spelled(key, value) for key, value in values.items()}
    choice = Choice(**values)
    _of_kind(choice.where, study, "choose")
    for name in {choice.measure, choice.prefer or choice.measure} - set(study.axes):
        _measures([name], kind)
        if kind.held_out(name) is None:
            raise InputError(f"choose {name}: it has no figure on held-out data to choose by")
    if choice.prefer in study.axes and not all(_is_number(run.get(choice.prefer)) for run in study.runs):
        raise InputError(f"choose prefer = {choice.prefer!r}: expected an axis whose values are all numbers")
    return choice


def _default_plots(study: Study, kind: Kind[Any]) -> Iterator[Plot]:
    """Each measure against the kind's own axis, where that is varied and its values are numbers."""
    values = [run[kind.axis] for run in study.runs if kind.axis in run]
    if kind.axis not in study.varied or not all(_is_number(v) for v in values):
        return
    lines = tuple(axis for axis in study.varied if axis != kind.axis)
    for measure in kind.shown:
        yield Plot(f"{measure}-{kind.axis}", kind.axis, measure, lines)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
