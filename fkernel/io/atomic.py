"""Writes to a temporary file or directory beside the target and renames it: a reader sees the old or the new one.

What is renamed was flushed to disk before, and so is the directory that names it: after a power cut, too, the old or
the new one is there, and whole. A symbolic link is followed: what it leads to is replaced, not the link.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fkernel.io.direct import NEW, open_direct, write_direct
from fkernel.io.refusals import plain_errors
from fkernel.io.temporary import temporary_beside

_BLOCK = 4096


def atomic_write(path: Path, chunks: Iterable[bytes | memoryview]) -> str:
    """Write or replace a file atomically; return the SHA-256 of its content.

    Raises:
        StoreError: the disk is full, or does not let us write; nothing is changed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     atomic_write(Path(directory) / "file", [b"some ", b"bytes"])[:12], os.listdir(directory)
        ('0d22cdcc10e6', ['file'])
    """
    with atomic_file(path) as temporary:
        return write_file(temporary, chunks)


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> str:
    """Write a file in a directory that is not there yet under its own name; return the SHA-256 of its content.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     write_file(Path(directory) / "file", [b"some ", b"bytes"])[:12]
        '0d22cdcc10e6'
    """
    digest = hashlib.sha256()

    def hashed() -> Iterator[bytes | memoryview]:
        for chunk in chunks:
            digest.update(chunk)
            yield chunk

    with open_direct(path, NEW) as file:
        write_direct(file, hashed())
    return digest.hexdigest()


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path that is renamed to `path` when the block succeeds, for what others write to a path.

    Raises:
        StoreError: the disk is full, or does not let us write; nothing is changed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     with atomic_file(Path(directory) / "file") as temporary:
        ...         temporary.touch()
        ...     os.listdir(directory)
        ['file']
    """
    with plain_errors("write", path):
        place = _followed(path)
        temporary = temporary_beside(place)
        try:
            yield temporary
            flush_to_disk(temporary)
            os.replace(temporary, place)
        except BaseException:  # Ctrl-C, too
            with suppress(OSError):
                temporary.unlink()
            raise
        flush_to_disk(place.parent)  # makes the new name durable, too


@contextmanager
def atomic_directory(path: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary directory that is renamed to `path` when the block succeeds.

    With `replace` an existing directory is replaced; without it, one that is not empty is an OSError.

    Raises:
        StoreError: the disk is full, or does not let us write; nothing is changed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     with atomic_directory(Path(directory) / "folder") as temporary:
        ...         (temporary / "file").touch()
        ...     os.listdir(directory), os.listdir(f"{directory}/folder")
        (['folder'], ['file'])
    """
    with plain_errors("write", path):
        place = _followed(path)
        temporary, before = temporary_beside(place), temporary_beside(place, old=True)
        temporary.mkdir()
        try:
            yield temporary
            for each in (temporary, *temporary.rglob("*")):
                flush_to_disk(each)
            if replace and place.exists():  # rename cannot replace a directory that is not empty
                os.rename(place, before)
            os.rename(temporary, place)
        except BaseException:
            if before.exists() and not place.exists():
                os.rename(before, place)
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        flush_to_disk(place.parent)
        shutil.rmtree(before, ignore_errors=True)


def make_directory(path: Path) -> Path:
    """Make a directory and its parents, where they are missing, and flush their names to disk.

    Raises:
        StoreError: there is a file, or the system refuses.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     make_directory(Path(directory) / "a" / "b").is_dir()
        True
    """
    with plain_errors("create", path):
        missing = [each for each in (path, *path.parents) if not each.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for each in missing:
            flush_to_disk(each.parent)
    return path


def remove_directory(path: Path) -> None:
    """Remove a directory and what it holds: a kill meanwhile leaves it as it was, or what the next sweep removes.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     remove_directory(make_directory(Path(directory) / "a" / "b").parent)
        ...     os.listdir(directory)
        []
    """
    with plain_errors("remove", path), suppress(FileNotFoundError):
        gone = temporary_beside(path)
        os.rename(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


def remove_file(path: Path) -> None:
    """Remove a file, if it is there.

    Raises:
        StoreError: the system refuses.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     remove_file(Path(directory) / "none")
    """
    with plain_errors("remove", path):
        path.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raise StoreError unless files can be written into a directory, or where it would be made.

    It is asked before hours of work, whose results would be lost there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     check_writable(Path(directory) / "results")
        ...     os.listdir(directory)
        []
    """
    with plain_errors("write to", path):
        there = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
        probe = temporary_beside(_followed(there) / "probe")
        try:
            write_file(probe, [bytes(_BLOCK)])
        finally:
            with suppress(OSError):
                probe.unlink()


def flush_to_disk(path: Path) -> None:
    """fsync a file or a directory."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _followed(path: Path) -> Path:
    return Path(os.path.realpath(path))
