"""What several runs need, made once: in the study's folder, for every process that works on it, and in memory."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from compress_uq.storage import replace_file, write_bytes
from compress_uq.study.lock import held

__all__ = ["TRAININGS", "Shared", "digest", "write_json"]

TRAININGS = "tuned"
"""Places of pruned and fine-tuned networks."""

T = TypeVar("T")
_KEPT = 2


def digest(identity: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits of plain values, whatever their order."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A whole JSON file or what was there before."""
    write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


class Shared:
    """A folder of things with names and identities; each is made by the first that asks, and the others wait."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._memory: OrderedDict[str, Any] = OrderedDict()

    def file(self, name: str, identity: Mapping[str, Any], make: Callable[[Path, Path], None]) -> Path:
        """A file, from `make(path to write, path for a training's state)`."""
        stem, _, suffix = name.partition(".")
        path = self._folder / f"{stem}-{digest(identity)}.{suffix}"
        state = path.with_suffix(".training")
        if not path.is_file():
            with held(path.with_suffix(".lock")):
                if not path.is_file():
                    with replace_file(path) as temporary:
                        make(temporary, state)
                    state.unlink(missing_ok=True)
        return path

    def record(self, name: str, identity: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Plain values, kept as JSON."""

        def write(path: Path, _state: Path) -> None:
            write_json(path, make())

        content: dict[str, Any] = json.loads(self.file(f"{name}.json", identity, write).read_bytes())
        return content

    @contextmanager
    def place(self, name: str, identity: Mapping[str, Any]) -> Iterator[Path]:
        """A folder for the state of a training that several runs start from, one process at a time inside."""
        path = self._folder / f"{name}-{digest(identity)}"
        path.mkdir(parents=True, exist_ok=True)
        with held(path.with_suffix(".lock")):
            yield path

    def clear(self, name: str) -> None:
        """Remove all places of a name, once no run needs them."""
        for path in self._folder.glob(f"{name}-*"):
            if path.is_dir():
                shutil.rmtree(path)

    def remembered(self, identity: Mapping[str, Any], make: Callable[[], T]) -> T:
        """An object in this process's memory, such as a model with its data; the last few are kept."""
        key = digest(identity)
        if key not in self._memory:
            while len(self._memory) >= _KEPT:
                self._memory.popitem(last=False)
            self._memory[key] = make()
        self._memory.move_to_end(key)
        found: T = self._memory[key]
        return found
