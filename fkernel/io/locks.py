"""Locks of directories: one process that writes, or several that read."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fkernel.errors import StoreError
from fkernel.io.refusals import plain_errors

_NOT_OURS = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


@contextmanager
def locked(directory: Path, name: str, shared: bool = False) -> Iterator[None]:
    """Lock a directory against other processes, or raise StoreError with the id of the one that holds the lock.

    The system frees the lock of a process that ends, however it ends.

    Args:
        directory: an existing one.
        name: the lock file in it, which has the holder's process id. It is not removed.
        shared: whether other readers may hold it, too. A place that cannot be written to is read without a lock file,
            where it has none.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory, locked(Path(directory), "lock"):
        ...     int((Path(directory) / "lock").read_text()) == os.getpid()
        True
    """
    import fcntl  # not on every system

    with plain_errors("lock", directory):
        lock = _opened(directory / name, shared)
    if lock is None:
        yield
        return
    with lock:
        with plain_errors("lock", directory):
            try:
                fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StoreError(
                    f"{str(directory)!r} is in use by {_holder(lock)}; wait until that ends, or choose another "
                    f"directory."
                ) from error
            if not shared:
                lock.truncate(0)
                lock.write(f"{os.getpid()}\n".encode())
        try:
            yield
        finally:
            # Explicit, since a forked process that has the file open would keep the lock after close.
            fcntl.flock(lock, fcntl.LOCK_UN)


def _opened(path: Path, shared: bool) -> Any:
    """The lock file, made where it is missing; for a reader who may not write, as it is, or None."""
    try:
        return open(path, "a+b", buffering=0)
    except OSError as error:
        if not shared or error.errno not in _NOT_OURS:
            raise
    return open(path, "rb", buffering=0) if path.exists() else None


def _holder(lock: Any) -> str:
    """Who holds a lock: readers leave no name, and a process that was killed leaves its own."""
    lock.seek(0)
    said = lock.read(32).decode(errors="replace").strip()
    try:
        os.kill(int(said), 0)
    except (ValueError, ProcessLookupError, OverflowError):
        return "another process"
    except PermissionError:
        pass
    return f"process {said}"
