"""Writes to a temporary file or directory beside the target and renames it: a reader sees the old or the new one."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fkernel.io.direct import NEW, open_direct, write_direct

PARTIAL = ".tmp"
"""Suffix of temporary names, which start with the target's."""


def atomic_write(path: Path, chunks: Iterable[bytes | memoryview]) -> str:
    """Write or replace a file atomically; return the SHA-256 of its content. One writer per directory.

    The temporary name is fixed, so that the next write replaces a killed process's leftovers.

    Example:
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     atomic_write(Path(directory) / "file", [b"some ", b"bytes"])[:12], os.listdir(directory)
        ('0d22cdcc10e6', ['file'])
    """
    digest = hashlib.sha256()

    def hashed() -> Iterator[bytes | memoryview]:
        for chunk in chunks:
            digest.update(chunk)
            yield chunk

    with _renamed(path.with_name(path.name + PARTIAL), path) as temporary, open_direct(temporary, NEW) as file:
        write_direct(file, hashed())
    return digest.hexdigest()


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path, unique to this process, that is renamed to `path` when the block succeeds.

    Example:
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     with atomic_file(Path(directory) / "file") as temporary:
        ...         temporary.touch()
        ...     os.listdir(directory)
        ['file']
    """
    with _renamed(path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}"), path) as temporary:
        yield temporary


@contextmanager
def atomic_directory(path: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary directory that is renamed to `path` when the block succeeds.

    With `replace` an existing directory is replaced; without it, one that is not empty is an OSError.

    Example:
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     with atomic_directory(Path(directory) / "folder") as temporary:
        ...         (temporary / "file").touch()
        ...     os.listdir(directory), os.listdir(f"{directory}/folder")
        (['folder'], ['file'])
    """
    temporary = Path(tempfile.mkdtemp(prefix=f"{path.name}.", suffix=PARTIAL, dir=path.parent))
    before = temporary.with_name(f"{temporary.name}-replaced")
    try:
        yield temporary
        for file in temporary.rglob("*"):
            flush_to_disk(file)
        temporary.chmod(0o755)  # mkdtemp's mode is 0o700
        if replace and path.exists():  # rename cannot replace a directory that is not empty
            os.rename(path, before)
        os.rename(temporary, path)
    except BaseException:
        if before.exists() and not path.exists():
            os.rename(before, path)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(before, ignore_errors=True)


def flush_to_disk(path: Path) -> None:
    """fsync a file or a directory."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextmanager
def _renamed(temporary: Path, path: Path) -> Iterator[Path]:
    try:
        yield temporary
        flush_to_disk(temporary)
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C, too
        with suppress(OSError):
            temporary.unlink()
        raise
    flush_to_disk(path.parent)  # makes the new name durable, too
