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
def reuse_memory() -> Iterator[None]:
    """Within, memory that is freed is what is taken next; afterwards, what is free goes back to the system.

    glibc hands every block above 32 MB back to the system when it is freed, and takes the next one fresh. Fresh memory
    is slow: 0.2 s a GB on a machine of its own, and up to 3 s on a virtual one whose host takes back what is free.
    Microbatches free and take the same blocks over and over. Every call of the library that runs passes enters this by
    itself; a loop of such calls, over checkpoints or batches, is faster inside of one that goes around it. It is
    process-wide, as malloc is, and may be entered more than once. Without glibc nothing happens.

    Example:
        >>> import torch
        >>> f = lambda params, x: x @ params["w"]
        >>> from fkernel import kernel, precond
        >>> checkpoints = [{"w": torch.zeros(2)}, {"w": torch.ones(2)}]
        >>> with reuse_memory():
        ...     kernels = [kernel(f, params, torch.eye(2), torch.eye(2), precond.identity()) for params in checkpoints]
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


_lock = threading.Lock()
_depth = [0]
"""How many `reuse_memory` are under way, in all threads: the first sets malloc's thresholds, the last resets them."""


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
