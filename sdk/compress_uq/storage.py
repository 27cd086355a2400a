"""Writing so that nothing is ever half-written: beside the target, then renamed."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compress_uq.errors import ArtifactError

__all__ = ["refuse_existing", "replace_directory", "replace_file", "sha256", "write_bytes"]


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`, renamed over it when the block ends well and removed when it does not.

    Raises:
        ArtifactError: the folder is missing or cannot be written to, or the disk is full.
    """
    target = Path(path)
    temporary: Path | None = None
    try:
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix)
        os.close(descriptor)
        temporary = Path(name)
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except OSError as error:
        raise _not_written(target, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a whole file or leave what was there.

    Raises:
        ArtifactError: it cannot be written.
    """
    with replace_file(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replace_directory(
    path: str | os.PathLike[str],
    *,
    overwrite: bool,
    mark: str = "manifest.json",
    kind: str = "bundle",
    workplace: Path | None = None,
) -> Iterator[Path]:
    """A temporary folder that takes the place of `path` when the block ends well.

    Args:
        path: the folder.
        overwrite: replace a folder that is there and holds `mark`.
        mark: the file by which a folder of this `kind` is known.
        workplace: where the temporary folder lies, on the same file system; beside `path` by default.

    Raises:
        ArtifactError: `path` exists and `overwrite` is False, or it cannot be written.
    """
    target = Path(path)
    refuse_existing(target, overwrite=overwrite, mark=mark, kind=kind)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        place = workplace or target.parent
        temporary = Path(tempfile.mkdtemp(dir=place, prefix=f".{target.name}."))
        os.chmod(temporary, 0o777 & ~_umask())
        yield temporary
        if target.exists():
            old = Path(tempfile.mkdtemp(dir=place, prefix=f".{target.name}.old.")) / "bundle"
            os.replace(target, old)
            os.replace(temporary, target)
            shutil.rmtree(old.parent)
        else:
            os.replace(temporary, target)
    except OSError as error:
        raise _not_written(target, error) from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def refuse_existing(target: Path, *, overwrite: bool, mark: str = "manifest.json", kind: str = "bundle") -> None:
    """Stop before any work where the output is already there.

    Raises:
        ArtifactError: it exists and may not be replaced, or is something else than what it would replace.
    """
    if not target.exists():
        return
    if not overwrite:
        raise ArtifactError(f"{target} exists: pass --overwrite (overwrite=True) to replace it, or another --out")
    if not target.is_dir() or (any(target.iterdir()) and not (target / mark).is_file()):
        raise ArtifactError(f"{target} is not a {kind} and is not overwritten: choose another --out")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _not_written(target: Path, error: OSError) -> ArtifactError:
    reason = error.strerror or str(error)
    return ArtifactError(
        f"{target} could not be written ({reason}): nothing was left behind; free space or choose another place"
    )
