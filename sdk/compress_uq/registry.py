"""One table per kind of plug-in: a row is a name, a line, a source and what builds it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from compress_uq.errors import UnknownNameError

__all__ = ["Entry", "Registry"]

T = TypeVar("T")


@dataclass(frozen=True)
class Entry(Generic[T]):
    """A named plug-in: what it does in one line, where it comes from, and the object itself."""

    name: str
    summary: str
    source: str
    value: T


class Registry(Generic[T]):
    """The entries of one kind, in the order they were given."""

    def __init__(self, kind: str, *entries: Entry[T]) -> None:
        self.kind = kind
        self._entries = {entry.name: entry for entry in entries}

    def __iter__(self) -> Iterator[Entry[T]]:
        return iter(self._entries.values())

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise UnknownNameError(self.kind, str(name), self._entries)
        return self._entries[name].value

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in order."""
        return tuple(self._entries)
