"""Keep freed memory in the process for the next microbatch, through glibc's malloc settings."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

from fkernel.boundary import public
from fkernel.distributed import Group

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h
_NEVER = 2**31 - 1
_LARGE = 1 << 20
_USUAL = 32 << 20  # where glibc's dynamic thresholds end up in a process that uses large tensors


@contextmanager
def reuse_memory() -> Iterator[None]:
    """Within the context, freed memory is reused; on exit, free memory is returned to the system.

    By default glibc returns every block above 32 MB to the system when it is freed, and the next allocation maps new
    pages. New pages are slow: 0.2 s a GB on bare metal, and up to 3 s on a virtual machine whose host reclaims free
    memory. Microbatches free and allocate the same blocks repeatedly. Every function of the library that runs passes
    enters this context; enter it around a loop over checkpoints or batches to keep memory between calls as well. It is
    process-wide, as malloc is, and reentrant. Without glibc it does nothing.

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
    with _lock:
        _reusing[0] += 1
        _set_thresholds(libc)
    try:
        yield
    finally:
        with _lock:
            _reusing[0] -= 1
            _set_thresholds(libc)
            if not _reusing[0]:
                libc.malloc_trim(0)


@contextmanager
def return_memory() -> Iterator[None]:
    """Within the context, large blocks go back to the system when they are freed, within `reuse_memory` too.

    For a few passes whose blocks have many sizes: what one of them leaves between blocks that are held, the next does
    not fit into, and it would count until the end.

    Example:
        >>> import torch
        >>> with reuse_memory(), return_memory():
        ...     x = torch.ones(1 << 20)
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    release_memory()
    with _lock:
        _returning[0] += 1
        _set_thresholds(libc)
    try:
        yield
    finally:
        with _lock:
            _returning[0] -= 1
            _set_thresholds(libc)
        release_memory()


@public
def kept_or_returned(group: Group | None) -> AbstractContextManager[None]:
    """Return the context for passes: `reuse_memory` in one process, `return_memory` over ranks.

    What is gathered and exchanged over ranks comes in blocks of many sizes between those that are held. Reused, they
    left holes that took as much as half of a rank's memory where θ is in shards, and an eighth where it is whole.

    Args:
        group: the ranks; None for one process.

    Example:
        >>> import torch
        >>> with kept_or_returned(None):
        ...     x = torch.ones(3)
    """
    return reuse_memory() if group is None else return_memory()


def release_memory() -> None:
    """Return free memory to the system, within `reuse_memory` too: before work whose blocks have other sizes.

    What is freed between blocks that are held is taken by blocks that fit alone, and counts until then.

    Example:
        >>> with reuse_memory():
        ...     release_memory()
    """
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


_lock = threading.Lock()
_reusing, _returning = [0], [0]
"""Number of open contexts in all threads: the first sets malloc's thresholds, the last resets them."""


def _set_thresholds(libc: Any) -> None:
    if _returning[0]:
        mapped, trimmed = _LARGE, _LARGE
    else:
        mapped, trimmed = (_NEVER, _NEVER) if _reusing[0] else (_USUAL, 2 * _USUAL)
    libc.mallopt(_MMAP, mapped)
    libc.mallopt(_TRIM, trimmed)


@cache
def _glibc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
