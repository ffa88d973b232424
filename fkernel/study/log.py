"""Logging: the logger `fkernel`, phases with their duration, and a JSON-lines handler."""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from fkernel.engine import listening
from fkernel.io import append_line, cut_partial_line, make_directory, plain_errors

LOGGER = logging.getLogger("fkernel")
LOGGER.addHandler(logging.NullHandler())
LEVELS = {"minimal": logging.WARNING, "normal": logging.INFO, "detailed": 15, "debug": logging.DEBUG}
"""Log levels; "detailed" includes the start of each phase, "debug" every microbatch."""


class JsonLines(logging.Handler):
    """Writes each record as a line of JSON: time, level, message, and its facts."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.DEBUG)
        self._path = make_directory(path.parent) / path.name
        with plain_errors("write to", path):
            cut_partial_line(path)
            append_line(path, b"", durable=False)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        line = {"time": round(record.created, 3), "level": record.levelname.lower(), "message": record.getMessage()}
        line |= getattr(record, "facts", {})
        with plain_errors("write to", self._path):
            append_line(self._path, (json.dumps(line, default=str, ensure_ascii=False) + "\n").encode(), durable=False)


@contextmanager
def recorded(path: Path, logger: logging.Logger = LOGGER) -> Iterator[None]:
    """Write a logger's records to a file of JSON lines while the block runs."""
    handler, level = JsonLines(path), logger.level
    logger.addHandler(handler)
    if not logger.isEnabledFor(logging.INFO):
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()


def say(logger: logging.Logger, message: str, level: int = logging.INFO, **facts: Any) -> None:
    """Log a message with machine-readable facts."""
    logger.log(level, message, extra={"facts": facts})


@contextmanager
def phase(logger: logging.Logger, name: str, **facts: Any) -> Iterator[dict[str, Any]]:
    """Log a phase's duration and the process's peak memory after it, and what the block adds to the dictionary."""
    say(logger, f"{name} …", LEVELS["detailed"], phase=name, event="begin")
    started, logged = time.perf_counter(), dict(facts)
    try:
        yield logged
    except BaseException as error:
        seconds = round(time.perf_counter() - started, 3)
        say(logger, f"{name} stopped: {type(error).__name__}", phase=name, event="stopped", seconds=seconds, **logged)
        raise
    seconds, peak = round(time.perf_counter() - started, 3), peak_mb()
    details = "".join(f", {value} {key.replace('_', ' ')}" for key, value in logged.items())
    say(logger, f"{name}: {seconds:.1f} s{details}", phase=name, event="end", seconds=seconds, peak_mb=peak, **logged)


Tick = Callable[[str, int, int], Any]
"""(what is being done, parts done since the last call, parts in all or 0 where that is not known)."""
_TICK: ContextVar[Tick | None] = ContextVar("tick", default=None)


@contextmanager
def shown(tick: Tick) -> Iterator[None]:
    """Tell a function what is being done within the block."""
    token = _TICK.set(tick)
    try:
        yield
    finally:
        _TICK.reset(token)


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Say what the block does, and how far the engine is with it, to whoever shows it.

    Example:
        >>> seen = []
        >>> from fkernel.engine import part_done
        >>> with shown(lambda *how: seen.append(how)), doing("the contraction"):
        ...     part_done(2)
        >>> seen
        [('the contraction', 0, 0), ('the contraction', 1, 2), ('the contraction', 0, 1)]
    """
    tick = _TICK.get()
    if tick is None:
        yield
        return
    counted = 0

    def part(total: int) -> None:
        nonlocal counted
        counted += 1
        tick(what, 1, total)

    tick(what, 0, 0)
    with listening(part):
        yield
    tick(what, int(not counted), counted or 1)


def peak_mb() -> float:
    """Peak resident memory of this process, MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 1e6 if sys.platform == "darwin" else peak / 1024 * 1.048576, 1)
