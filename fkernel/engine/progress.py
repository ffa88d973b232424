"""How far a computation is: whoever shows it listens, and loops report each part that they have done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from fkernel.boundary import public

_LISTENER: ContextVar[Callable[[int], Any] | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Callable[[int], Any]) -> Iterator[None]:
    """Call a function after every part that is done within the block.

    Args:
        listener: called with the number of parts in all, 0 where that is not known before.

    Example:
        >>> seen = []
        >>> with listening(seen.append):
        ...     part_done(2)
        ...     part_done(2)
        >>> seen
        [2, 2]
    """
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


@public
def part_done(total: int = 0) -> None:
    """Report that a part is done, of so many in all; 0 where their number is not known.

    Example:
        >>> with listening(print):
        ...     part_done(7)
        7
    """
    listener = _LISTENER.get()
    if listener is not None:
        listener(total)
