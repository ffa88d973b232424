"""Every operation that changes a folder, counted in the order in which they come, and the process stopped at one.

It stands under `fkernel.io`: `os` and `open` are replaced, so that what bypasses that room is met as well.
"""

from __future__ import annotations

import builtins
import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from fkernel.io import is_temporary

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
FULL = frozenset({"open", "write", "mkdir", "fsync"})
"""What a full disk refuses; what is there can still be renamed and deleted."""
READ_ONLY = frozenset({"open", "write", "mkdir", "replace", "rename", "unlink", "rmdir", "truncate"})


class Stop(NamedTuple):
    """What happens at an operation.

    Attributes:
        at: its number, from 1; 0 for none.
        how: "before" and "middle" kill the process; "error" refuses this operation and all later ones of its kind.
        error: the error's number.
        refused: names of operations that are refused.
    """

    at: int = 0
    how: str = "before"
    error: int = 0
    refused: frozenset[str] = frozenset()


class Disk:
    """The operations beneath a folder: their names, one after the other.

    Attributes:
        dirty: paths whose content, or whose names where it is a folder, a power cut could lose.
        unsafe: names under which something dirty was put: after a power cut that could be empty.
    """

    def __init__(self, root: str | os.PathLike[str], stop: Stop) -> None:
        self.root, self.stop, self.names = os.path.realpath(root), stop, list[str]()
        self.dirty, self.unsafe = set[str](), list[str]()

    def met(self, name: str, path: str, half: Callable[[], Any] = lambda: None, target: str | None = None) -> None:
        """Count an operation that is about to happen, and stop there if that is asked."""
        if not (os.path.realpath(path) + "/").startswith(self.root + "/"):
            return
        self.names.append(name)
        self._note(name, os.path.realpath(path), target)
        number, stop = len(self.names), self.stop
        if stop.how == "error":
            if stop.at and number >= stop.at and name in stop.refused:
                raise OSError(stop.error, os.strerror(stop.error), path)
        elif number == stop.at:
            try:
                if stop.how == "middle":
                    half()
            finally:
                os.kill(os.getpid(), signal.SIGKILL)

    def _note(self, name: str, path: str, target: str | None) -> None:
        """Keep account of what is flushed to disk."""
        if name == "fsync":
            self.dirty.discard(path)
        elif name in ("unlink", "rmdir"):
            self.dirty -= self._below(path)
        elif target is not None:
            moved, place = self._below(path), os.path.join(os.path.realpath(os.path.dirname(target)), name_of(target))
            if not is_temporary(name_of(place)):
                self.dirty.add(os.path.dirname(place))
                self.unsafe += [place] if moved else []
            self.dirty = self.dirty - moved | {place + each.removeprefix(path) for each in moved}
        else:
            self.dirty |= {path} if name != "mkdir" else set()
            if name in ("open", "mkdir") and not is_temporary(name_of(path)) and not os.path.exists(path):
                self.dirty.add(os.path.dirname(path))

    def _below(self, path: str) -> set[str]:
        return {each for each in self.dirty if each == path or each.startswith(path + "/")}


name_of = os.path.basename


def path_of(file: Any, dir_fd: int | None = None) -> str:
    """The path that an argument of a function of `os` names."""
    if isinstance(file, int):
        return os.readlink(f"/proc/self/fd/{file}")
    path = os.fsdecode(file)
    return path if dir_fd is None else os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)


@contextmanager
def watched(root: str | os.PathLike[str], stop: Stop = Stop()) -> Iterator[Disk]:  # noqa: B008 - a tuple
    """Count what changes a folder within the block."""
    disk, real = Disk(root, stop), {name: getattr(os, name) for name in NAMES}
    real_open = io.open

    def plain(name: str) -> Any:
        def call(file: Any, *rest: Any, **more: Any) -> Any:
            said = {"remove": "unlink", "ftruncate": "truncate"}.get(name, name)
            target = path_of(rest[0]) if said in ("rename", "replace") else None
            disk.met(said, path_of(file, more.get("dir_fd")), target=target)
            return real[name](file, *rest, **more)

        return call

    def os_open(path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        if flags & WRITES:
            disk.met("open", path_of(path, more.get("dir_fd")), lambda: real["open"](path, flags, mode, **more))
        return real["open"](path, flags, mode, **more)

    def os_write(file: int, data: Any) -> int:
        disk.met("write", path_of(file), lambda: real["write"](file, bytes(memoryview(data)[: len(data) // 2])))
        return real["write"](file, data)

    class Raw(io.FileIO):
        def write(self, data: Any, /) -> int:
            half = lambda: super(Raw, self).write(bytes(memoryview(data).cast("B")[: len(data) // 2]))  # noqa: E731
            disk.met("write", path_of(self.fileno()), half)
            return super().write(data)

        def truncate(self, size: int | None = None, /) -> int:
            disk.met("truncate", path_of(self.fileno()))
            return super().truncate(size)

    def python_open(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **more: Any) -> Any:
        if not {*mode} & {*"wax+"} or isinstance(file, int) or "opener" in more:
            return real_open(file, mode, buffering, *rest, **more)
        disk.met("open", path_of(file), lambda: real_open(file, mode, buffering, *rest, **more))
        raw = Raw(file, mode.replace("b", "").replace("t", ""))
        if "b" in mode and buffering == 0:
            return raw
        buffered: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *rest, **more)

    replaced = {**{name: plain(name) for name in NAMES}, "open": os_open, "write": os_write}
    for name, function in replaced.items():
        setattr(os, name, function)
    io.open = builtins.open = python_open
    try:
        yield disk
    finally:
        for name, function in real.items():
            setattr(os, name, function)
        io.open = builtins.open = real_open


NAMES = ("open", "write", "replace", "rename", "fsync", "truncate", "ftruncate", "mkdir", "unlink", "remove", "rmdir")
