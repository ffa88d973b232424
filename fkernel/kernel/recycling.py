"""Memory that one microbatch frees is what the next one is given."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h
_NEVER = 2**31 - 1
_USUAL = 32 << 20  # where glibc's own, moving thresholds end up in a process that uses large tensors


@contextmanager
def recycled() -> Iterator[None]:
    """Within, memory that one microbatch frees is what the next one is given.

    glibc hands every block above 32 MB back to the system when it is freed, and takes the next one fresh. Microbatches
    free and take the same blocks over and over; keeping them made a pass over a batch a quarter faster. Process-wide,
    as malloc is; afterwards the thresholds are glibc's own and what is free goes back. Elsewhere nothing happens.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    _enter(libc)
    try:
        yield
    finally:
        _leave(libc)


def trim() -> None:
    """Give back to the system what is free: what comes next is of other sizes, or mapped from a file."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


_lock = threading.Lock()
_depth = [0]
"""How many `recycled` are under way, in all threads: the first sets malloc's thresholds, the last puts them back."""


def _enter(libc: Any) -> None:
    with _lock:
        if not _depth[0]:
            libc.mallopt(_TRIM, _NEVER)
            libc.mallopt(_MMAP, _NEVER)
        _depth[0] += 1


def _leave(libc: Any) -> None:
    with _lock:
        _depth[0] -= 1
        if not _depth[0]:
            libc.mallopt(_MMAP, _USUAL)
            libc.mallopt(_TRIM, 2 * _USUAL)
            libc.malloc_trim(0)


@cache
def _glibc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
