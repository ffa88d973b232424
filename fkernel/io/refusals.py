"""What systems refuse, in plain words: a full disk, a used-up quota, a read-only place, a name that is too long."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fkernel.errors import FKernelError, StoreError

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Error numbers of a full disk, a used-up quota and a limit on file sizes."""
_YOURS = "choose a directory that you may write to"
_ROOM = "make room, or choose another disk"
_LOCAL = "choose a directory on a local disk"
_PLAIN = {
    errno.ENOTDIR: ("it, or a part of its path, is a file", "name a directory"),
    errno.EEXIST: ("it is a file", "name a directory"),
    errno.EACCES: ("permission is denied", _YOURS),
    errno.EPERM: ("permission is denied", _YOURS),
    errno.EROFS: ("its file system is read-only", _YOURS),
    errno.ENOSPC: ("the disk is full", _ROOM),
    errno.EDQUOT: ("the quota is used up", _ROOM),
    errno.EFBIG: ("a limit on file sizes was reached", "lift it (ulimit -f), or choose another disk"),
    errno.ENOLCK: ("its file system has no locks", _LOCAL),
    errno.ENOTSUP: ("its file system cannot do that", _LOCAL),
    errno.EIO: ("the disk reports an error", "look at the system's log, or choose another disk"),
    errno.EMFILE: ("too many files are open", "close some, or raise the limit (ulimit -n)"),
    errno.ENOTEMPTY: ("a directory that is not empty is there", "delete it, or choose another one"),
}


@contextmanager
def plain_errors(doing: str, path: Path) -> Iterator[None]:
    """Turn an error of the system about a file or directory into a StoreError with the reason and advice.

    It keeps errno, so that a caller can tell a full disk from others.

    Example:
        >>> with plain_errors("open", Path("folder")):
        ...     raise OSError(errno.ENOTDIR, "Not a directory")
        Traceback (most recent call last):
        fkernel.errors.StoreError: Cannot open 'folder': it, or a part of its path, is a file; name a directory.
    """
    try:
        yield
    except FKernelError:
        raise
    except Exception as error:
        number = _number(error, path)
        if number is None:
            raise
        raise _plain(doing, path, error, number) from error


def explained(error: OSError) -> str:
    """An error of the system as a sentence, for one that nobody turned into a StoreError.

    Example:
        >>> explained(OSError(errno.ENOSPC, "No space left on device", "results/kernel.npz"))
        "Cannot use 'results/kernel.npz': the disk is full; make room, or choose another disk."
    """
    if isinstance(error, FKernelError) or error.errno not in _PLAIN or error.filename is None:
        return str(error)
    return str(_plain("use", Path(str(error.filename)), error, error.errno))


def _plain(doing: str, path: Path, error: Exception, number: int) -> StoreError:
    said = (error.strerror if isinstance(error, OSError) else None) or str(error)
    what, todo = _PLAIN.get(number, (said, "choose another directory"))
    plain = StoreError(f"Cannot {doing} {str(path)!r}: {what}; {todo}.")
    plain.errno = number
    return plain


def _number(error: Exception, path: Path) -> int | None:
    """The system's number of an error; None where it is no error of the system."""
    if isinstance(error, OSError):
        return error.errno or 0
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # of Rust: safetensors, tokenizers
        return int(found[1])
    if "PytorchStreamWriter failed" in str(error):  # of torch.save, which does not say why
        there = next(each for each in path.absolute().parents if each.exists())
        return errno.ENOSPC if shutil.disk_usage(there).free < 1 << 20 else errno.EIO
    return None
