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
"""What temporary names end in; they begin with the target's."""


def atomic_write(path: Path, chunks: Iterable[bytes | memoryview]) -> str:
    """Write or replace a file of a directory that one process writes to; return the SHA-256 of its content.

    The temporary name is always the same, so that what a killed process left is written over.

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
    """Give a temporary path to write to, of this process alone, which becomes the file when the block ends well.

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
    """Give a temporary directory to fill, which becomes the one at `path` when the block ends well.

    With `replace` a directory that is there makes way, without it only an empty one does: another is an OSError.

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
        temporary.chmod(0o755)  # mkdtemp's own mode is private
        if replace and path.exists():  # out of the way first: a directory is not renamed onto one that holds something
            os.rename(path, before)
        os.rename(temporary, path)
    except BaseException:
        if before.exists() and not path.exists():
            os.rename(before, path)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(before, ignore_errors=True)


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or a directory's names, are on the disk."""
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
    flush_to_disk(path.parent)  # the new name outlives a loss of power only once the directory is flushed as well
