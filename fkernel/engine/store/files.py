"""Files that are there whole or not at all, directories that one process has at a time, errors in plain words."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fkernel.engine.store import direct
from fkernel.errors import StoreError

TEMPORARY = ".tmp"
"""What the name of a file ends in while it is being written."""
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Error numbers of a full disk, a used-up quota and a limit on file sizes."""
_YOURS = "choose a directory that you may write to"
_PLAIN = {
    errno.ENOTDIR: ("it, or a part of its path, is a file", "name a directory"),
    errno.EEXIST: ("it is a file", "name a directory"),
    errno.EACCES: ("permission is denied", _YOURS),
    errno.EPERM: ("permission is denied", _YOURS),
    errno.EROFS: ("its file system is read-only", _YOURS),
    errno.ENOSPC: ("the disk is full", "make room, or choose another disk"),
}


@contextmanager
def plain_errors(doing: str, directory: Path) -> Iterator[None]:
    """Turn what the system says of a directory into a StoreError: what could not be done, why, and what to do."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        what, todo = _PLAIN.get(error.errno or 0, (error.strerror or str(error), "choose another directory"))
        raise StoreError(f"Cannot {doing} {str(directory)!r}: {what}; {todo}.") from error


@contextmanager
def locked(directory: Path, name: str) -> Iterator[None]:
    """Keep other processes out of a directory, or raise StoreError naming the one that has it.

    Args:
        directory: it exists.
        name: the file in it that is locked, and that holds the number of the process that did so. It stays.
    """
    import fcntl  # not on every system, and nothing else needs it

    with plain_errors("lock", directory):
        lock = open(directory / name, "a+b", buffering=0)  # noqa: SIM115 - closed below
    with lock:
        with plain_errors("lock", directory):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                lock.seek(0)
                holder = lock.read(32).decode(errors="replace").strip()
                raise StoreError(
                    f"{str(directory)!r} is in use by process {holder}; wait until that ends, or choose another "
                    f"directory."
                ) from error
            lock.truncate(0)
            lock.write(f"{os.getpid()}\n".encode())
        try:
            yield
        finally:
            # Not left to the closing: a process forked meanwhile has the file open too, and would keep the lock.
            fcntl.flock(lock, fcntl.LOCK_UN)


def write_atomically(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a file beside its place, flush it to the disk and move it into place; leave nothing where that fails."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with direct.opened(temporary, direct.NEW) as file:
            direct.write(file, chunks)
            flush(file)
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C, too
        with suppress(OSError):
            temporary.unlink()
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the new name outlives a loss of power only once the directory is flushed as well
    finally:
        os.close(directory)


def flush(file: int) -> None:
    """Bring to the disk what was written."""
    os.fsync(file)


def hashed(chunks: Iterable[bytes | memoryview], digest: Any) -> Iterator[bytes | memoryview]:
    """Pass chunks on, and take them into a hash on the way."""
    for chunk in chunks:
        digest.update(chunk)
        yield chunk


def checksum(path: Path) -> str:
    """SHA-256 of a file, a chunk at a time."""
    digest = hashlib.sha256()
    for chunk in direct.contents(path):
        digest.update(chunk)
    return digest.hexdigest()
