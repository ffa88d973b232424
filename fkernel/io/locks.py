"""Directory locks, and readable errors for directories."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fkernel.errors import StoreError

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
    """Turn an OSError about a directory into a StoreError with the reason and advice.

    Example:
        >>> with plain_errors("open", Path("folder")):
        ...     raise OSError(errno.ENOTDIR, "Not a directory")
        Traceback (most recent call last):
        fkernel.errors.StoreError: Cannot open 'folder': it, or a part of its path, is a file; name a directory.
    """
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        what, todo = _PLAIN.get(error.errno or 0, (error.strerror or str(error), "choose another directory"))
        raise StoreError(f"Cannot {doing} {str(directory)!r}: {what}; {todo}.") from error


@contextmanager
def locked(directory: Path, name: str) -> Iterator[None]:
    """Lock a directory against other processes, or raise StoreError with the id of the one that holds the lock.

    Args:
        directory: an existing one.
        name: the lock file in it, which has the holder's process id. It is not removed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory, locked(Path(directory), "lock"):
        ...     int((Path(directory) / "lock").read_text()) == os.getpid()
        True
    """
    import fcntl  # not on every system

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
            # Explicit, since a forked process that has the file open would keep the lock after close.
            fcntl.flock(lock, fcntl.LOCK_UN)
