"""One process at a time: a lock that the system lets go of when its holder is gone, however it ended."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["held", "held_or_not"]

_PAUSE = 0.2

if sys.platform == "win32":
    import msvcrt

    def _try(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _try(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def held_or_not(path: Path) -> Iterator[bool]:
    """True inside the block where this process got the lock, False where another holds it.

    The file stays: were it removed, one process could hold the old file and another the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield _got(descriptor)
    finally:
        os.close(descriptor)  # lets the lock go


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Wait until the lock is ours, and hold it inside the block."""
    while True:
        with held_or_not(path) as ours:
            if ours:
                yield
                return
        time.sleep(_PAUSE)


def _got(descriptor: int) -> bool:
    try:
        _try(descriptor)
    except OSError:
        return False
    return True
