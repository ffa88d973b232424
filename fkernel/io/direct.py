"""Reading and writing past the system's page cache, where the system and the file system allow it.

A store is larger than the memory that was granted, and is read once or twice, so that keeping it in the page cache
gains nothing; and filling that cache takes time: on a small virtual machine 0.3 GB/s were written by way of it, one
core busy, and 1.9 GB/s past it, at a tenth of one. What passes by it must be aligned, in memory and in the file:
writing goes through one aligned buffer, reading takes the aligned range around what is asked.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fkernel.shapes import Tensor

ALIGNMENT = 4096
BUFFER = 2 << 20
NEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it


@contextmanager
def open_direct(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Open a file past the page cache; through it where its file system has no other way.

    Example:
        >>> with open_direct(Path(__file__)) as file:
        ...     bytes(read_direct(file, 3, 10).tolist())
        b'Reading'
    """
    try:
        file = os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        file = os.open(path, flags, 0o666)
    try:
        yield file
    finally:
        os.close(file)


def write_direct(file: int, chunks: Iterable[bytes | memoryview]) -> None:
    """Write the content of a file of `open_direct(path, NEW)`."""
    room, filled = memoryview(mmap.mmap(-1, BUFFER)), 0  # a map is aligned to pages
    for chunk in chunks:
        rest = memoryview(chunk).cast("B")
        while rest:
            taken = min(len(rest), BUFFER - filled)
            room[filled : filled + taken] = rest[:taken]
            rest, filled = rest[taken:], filled + taken
            if filled == BUFFER:
                _write(file, room)
                filled = 0
    _by_the_cache(file)  # the end of a file need not be aligned
    _write(file, room[:filled])


def read_direct(file: int, start: int, stop: int) -> Tensor:
    """Read bytes start to stop − 1 of a file of `open_direct`, [stop − start] uint8.

    Raises:
        ValueError: the file ends before.
    """
    low, high = start // ALIGNMENT * ALIGNMENT, -(-stop // ALIGNMENT) * ALIGNMENT
    room = torch.empty(high - low + ALIGNMENT, dtype=torch.uint8)
    room = room[-room.data_ptr() % ALIGNMENT :][: high - low]
    bytes_: Any = room.numpy()
    view, got = memoryview(bytes_), 0
    while got < stop - low:
        more = os.preadv(file, [view[got:]], low + got)
        if not more:
            raise ValueError(f"it ends at byte {low + got}, before byte {stop}")
        got += more
    return room[start - low : stop - low]


def file_chunks(path: Path) -> Iterator[memoryview]:
    """Walk a file's bytes; a chunk is good until the next one is asked for."""
    room, at = mmap.mmap(-1, BUFFER), 0
    with open_direct(path) as file:
        while got := os.preadv(file, [room], at):
            yield memoryview(room)[:got]
            at += got


def _write(file: int, view: memoryview) -> None:
    while view:
        try:
            view = view[os.write(file, view) :]
        except OSError as error:
            # A limit on file sizes may cut an aligned piece at an odd place: the cache takes it, or says what is wrong.
            if error.errno != errno.EINVAL or not _by_the_cache(file):
                raise


def _by_the_cache(file: int) -> bool:
    """Go on through the page cache; tell whether it was past it until now."""
    if not _DIRECT:
        return False
    import fcntl  # not on every system

    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    fcntl.fcntl(file, fcntl.F_SETFL, flags & ~_DIRECT)
    return bool(flags & _DIRECT)
