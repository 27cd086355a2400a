"""Plain values of a file against the types that Python asks for."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Union, get_args, get_origin

from compress_uq.errors import InputError

__all__ = ["conform", "plain_hints", "plain_text", "several", "to_name"]

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


def to_name(key: str) -> str:
    """A long option's spelling, `round-to`, as Python spells it, `round_to`."""
    return key.replace("-", "_")


def several(given: str | tuple[str, ...]) -> tuple[str, ...]:
    """One or several names as several."""
    return (given,) if isinstance(given, str) else given


def plain_text(value: Any) -> str:
    """A value of a file as text: `0.5`, `1,2`, `key=value`, and `-` for none."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ",".join(plain_text(v) for v in value)
    if isinstance(value, Mapping):
        return ",".join(f"{k}={plain_text(v)}" for k, v in value.items())
    return str(value)


def conform(where: str, value: Any, hint: Any) -> Any:
    """The value as its type hint wants it: lists become tuples, whole numbers stand for numbers.

    Raises:
        InputError: no plain type of the hint takes it; says where it stands.
    """
    plain = list(_plain_types(hint))
    for kind in plain:
        found = _as(kind, value)
        if found is not None:
            return found[0]
    expected = " or ".join(dict.fromkeys(_word(kind) for kind in plain)) or "nothing that a file can hold"
    raise InputError(f"{where} = {value!r}: expected {expected}")


def plain_hints(hints: Mapping[str, Any]) -> dict[str, Any]:
    """The hints of which at least one type can stand in a file."""
    return {name: hint for name, hint in hints.items() if any(True for _ in _plain_types(hint))}


def _plain_types(hint: Any) -> Iterator[Any]:
    """The members of a union that a file can hold."""
    if get_origin(hint) in (Union, types.UnionType):
        for part in get_args(hint):
            yield from _plain_types(part)
    elif hint in _WORDS or _is_a(hint, Mapping) or _is_a(hint, Sequence):
        yield hint


def _is_a(hint: Any, kind: type) -> bool:
    origin = get_origin(hint)
    return isinstance(origin, type) and issubclass(origin, kind)


def _as(kind: Any, value: Any) -> tuple[Any] | None:
    """The value in a tuple of one, or None where it is of another type."""
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return (float(value),)
    if kind in _WORDS:
        return (value,) if type(value) is kind else None
    if _is_a(kind, Mapping):
        return (dict(value),) if isinstance(value, Mapping) else None
    if not isinstance(value, list | tuple):
        return None
    parts = [_as(get_args(kind)[0], part) for part in value]
    return None if None in parts else (tuple(part[0] for part in parts if part is not None),)


def _word(kind: Any) -> str:
    if kind in _WORDS:
        return _WORDS[kind]
    return "a table" if _is_a(kind, Mapping) else f"a list of {_WORDS.get(get_args(kind)[0], 'value').split()[-1]}s"
