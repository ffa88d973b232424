"""Names of temporary files and folders, which say who writes them, and the removal of those whose writer is gone.

    kernel.npz.1f09a3b2-4711-98765-0.tmp        target . machine - process - its start - number .tmp
    batch.1f09a3b2-4711-98765-1.old.tmp         a folder that was there, while another takes its place

The machine is a hash of host name, boot and PID namespace: a process of another one cannot be looked up, so what it
left is removed once it has not changed for a day. A process's start tells it from a later one with the same number. A
folder that was moved aside, and whose successor never came, gets its name back.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import count
from pathlib import Path

PARTIAL = ".tmp"
"""Suffix of temporary names, which start with the target's."""
DAY = 86400.0
"""Seconds without a change after which what another machine's process left is removed."""
_WRITER = r"(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<start>\d+)-\d+"
_NAME = re.compile(rf"(?P<target>.+)\.{_WRITER}(?P<old>\.old)?\.tmp", re.DOTALL)
_NUMBERS = count()
_swept = set[tuple[int, str]]()


def temporary_beside(path: Path, old: bool = False) -> Path:
    """A name beside `path` that no other call returns; the first one in a folder sweeps the folder.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     name = temporary_beside(Path(folder) / "file").name
        ...     name.startswith("file."), is_temporary(name)
        (True, True)
    """
    mark = (os.getpid(), os.path.realpath(path.parent))
    if mark not in _swept:
        sweep(path.parent)
        _swept.add(mark)
    writer = f"{_machine()}-{os.getpid()}-{_start(os.getpid()) or 0}-{next(_NUMBERS)}"
    return path.with_name(f"{path.name}.{writer}{'.old' if old else ''}{PARTIAL}")


def is_temporary(name: str) -> bool:
    """Whether a file or folder has a temporary name."""
    return _NAME.fullmatch(name) is not None


def sweep(directory: Path) -> None:
    """Remove temporary files and folders in a directory whose writer is gone; what cannot be removed stays.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     left = temporary_beside(Path(folder) / "file")
        ...     left.touch()
        ...     sweep(Path(folder))
        ...     dead = left.with_name(left.name.replace(f"-{os.getpid()}-", "-4194305-"))
        ...     _ = left.rename(dead)
        ...     sweep(Path(folder))
        ...     os.listdir(folder)
        []
    """
    with suppress(OSError):
        found = [(each, match) for each in os.scandir(directory) if (match := _NAME.fullmatch(each.name))]
        for each, match in found:
            with suppress(OSError):
                if _is_dead(match, each.stat(follow_symlinks=False).st_mtime):
                    _remove(Path(each.path), directory / match["target"], bool(match["old"]))


@contextmanager
def scratch_directory(name: str) -> Iterator[Path]:
    """A folder in the system's temporary directory, deleted after the block; after a kill, by the next call.

    Example:
        >>> with scratch_directory("fkernel-example") as folder:
        ...     (folder / "file").touch()
        >>> folder.exists()
        False
    """
    folder = temporary_beside(Path(tempfile.gettempdir()) / name)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove(path: Path, target: Path, old: bool) -> None:
    if old and not os.path.lexists(target):
        os.rename(path, target)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()


def _is_dead(match: re.Match[str], changed: float) -> bool:
    """Whether the process that a temporary name names is gone."""
    if match["machine"] != _machine():
        return time.time() - changed > DAY
    pid, start = int(match["pid"]), int(match["start"])
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass  # another user's
    now = _start(pid)
    return now is None or start not in (0, now)


def _start(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; 0 where there is no /proc; None for one that has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return 0
    return None if state in "ZX" else int(fields[18])


@cache
def _machine() -> str:
    facts = [socket.gethostname()]
    with suppress(OSError):
        facts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]
