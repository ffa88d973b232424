"""What a run says while it goes on: Python's `logging` under the name `fkernel`, and a JSON line for every record."""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOGGER = logging.getLogger("fkernel")
LOGGER.addHandler(logging.NullHandler())
LEVELS = {"minimal": logging.WARNING, "normal": logging.INFO, "detailed": 15, "debug": logging.DEBUG}
"""How much is said; "detailed" has every phase's begin, "debug" every microbatch."""


class JsonLines(logging.Handler):
    """Writes every record as one JSON object a line: time, level, message, and the facts that came with it."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.DEBUG)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        line = {"time": round(record.created, 3), "level": record.levelname.lower(), "message": record.getMessage()}
        line |= getattr(record, "facts", {})
        self._file.write(json.dumps(line, default=str, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


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
    """Log a message with facts that a program can read."""
    logger.log(level, message, extra={"facts": facts})


@contextmanager
def phase(logger: logging.Logger, name: str, **facts: Any) -> Iterator[dict[str, Any]]:
    """Log how long a phase took and the process's peak memory after it; what is put in the dictionary is logged too."""
    say(logger, f"{name} …", LEVELS["detailed"], phase=name, event="begin")
    began, found = time.perf_counter(), dict(facts)
    try:
        yield found
    except BaseException as error:
        seconds = round(time.perf_counter() - began, 3)
        say(logger, f"{name} stopped: {type(error).__name__}", phase=name, event="stopped", seconds=seconds, **found)
        raise
    seconds, peak = round(time.perf_counter() - began, 3), peak_mb()
    said = "".join(f", {value} {key.replace('_', ' ')}" for key, value in found.items())
    say(logger, f"{name}: {seconds:.1f} s{said}", phase=name, event="end", seconds=seconds, peak_mb=peak, **found)


def peak_mb() -> float:
    """Peak resident memory of this process, MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 1e6 if sys.platform == "darwin" else peak / 1024 * 1.048576, 1)
