"""How much memory something takes, measured in a process of its own: the high-water mark of its resident memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress_uq.errors import GateError, InputError
from compress_uq.runtime import session

__all__ = ["parse_bytes", "peak_of_file", "peak_of_process", "random_inputs"]

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_DTYPES = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8, "tensor(int64)": np.int64}


def parse_bytes(given: int | str) -> int:
    """A number of bytes, as it is or such as `900MB`, `1.5GiB`.

    Raises:
        InputError: something else, or nothing above 0.
    """
    text = str(given).strip().lower().replace(" ", "")
    digits = text.rstrip("bgikm")
    try:
        size = int(float(digits) * _UNITS[text[len(digits) :]])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise InputError(f"memory {given!r}: expected bytes above 0, such as 900MB or 1.5GiB")
    return size


def random_inputs(made: Any, batch: int) -> dict[str, np.ndarray]:
    """Something of the right shape and type for every input of a session, from a fixed seed."""
    random = np.random.default_rng(batch)
    feed = {}
    for given in made.get_inputs():
        shape = (batch, *given.shape[1:])
        dtype = _DTYPES[given.type]
        drawn = random.normal(size=shape) if dtype is np.float32 else random.integers(0, 256, shape)
        feed[given.name] = drawn.astype(dtype)
    return feed


def peak_of_file(content: bytes, batch: int, *, provider: str = "CPUExecutionProvider", threads: int = 1) -> int:
    """Bytes that a process with onnxruntime and numpy holds at most while it loads a file and answers `batch` images.

    Raises:
        GateError: the process ended early.
    """
    code = "from compress_uq.footprint import _run_file; _run_file()"
    return peak_of_process(code, (str(batch), provider, str(threads)), content)


def peak_of_process(code: str, arguments: Sequence[str] = (), content: bytes = b"") -> int:
    """Bytes of resident memory that a Python process with this code holds at most; `content` is its standard input.

    Raises:
        GateError: the process ended early, as one does that asks for more memory than there is.
    """
    line = f"{code}; from compress_uq.footprint import _peak; print(_peak())"
    done = subprocess.run([sys.executable, "-c", line, *arguments], input=content, capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        reason = said[-1] if said else f"signal {-done.returncode}"
        raise GateError(f"memory could not be measured: the process that tried ended with {reason}")
    return int(done.stdout.split()[-1])


def _run_file() -> None:
    """What the other process does."""
    batch, provider, threads = sys.argv[1:]
    made = session(sys.stdin.buffer.read(), providers=[provider], threads=int(threads))
    feed = random_inputs(made, int(batch))
    for _ in range(2):
        made.run(None, feed)


def _peak() -> int:
    """Of this process; `ru_maxrss` would count what the process that started it held."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    import resource  # not on every system

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
