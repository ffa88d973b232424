"""Error messages, exit codes, progress bars and consoles of the commands."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Print an error in one line and exit: 2 for user errors, 1 for a failed demo, 130 after Ctrl-C."""
    from fkernel.errors import DemoError, FKernelError  # imported here to keep --help fast

    try:
        yield
    except KeyboardInterrupt:
        print_error("stopped. What is complete is kept; the same command goes on from there.")
        raise typer.Exit(130) from None
    except (FKernelError, OSError) as error:
        if not (getattr(error, "of_all_ranks", False) and int(os.environ.get("RANK", "0"))):
            print_error(str(error))  # of an error that all ranks raise, rank 0 tells
        raise typer.Exit(1 if isinstance(error, DemoError) else 2) from error


def print_error(text: str) -> None:
    """Print an error message to stderr."""
    Console(stderr=True).print(f"fkernel: {text}", style="red", markup=False, highlight=False, soft_wrap=True)


def wide(least: int) -> Console:
    """A console for tables: as wide as the terminal; at least `least` where the output is a file."""
    console = Console()
    return console if console.width >= least or console.is_terminal else Console(width=least)


@contextmanager
def progress_and_log(level: str) -> Iterator[Callable[[str, int, int], Any]]:
    """Show a runner's log on stderr at a level, and a progress bar per phase."""
    from rich.logging import RichHandler

    from fkernel.demo import visible
    from fkernel.errors import PlanError
    from fkernel.study import LEVELS

    if level not in LEVELS:
        raise PlanError(f"--log is {level!r}; expected {', '.join(LEVELS)}.")
    console, logger = Console(stderr=True), logging.getLogger("fkernel")
    handler = RichHandler(console=console, show_path=False, show_level=False, log_time_format="%H:%M:%S", markup=False)
    handler.setLevel(LEVELS[level])
    logger.addHandler(handler)
    logger.setLevel(min(LEVELS[level], logging.INFO))
    showwarning, logged = warnings.showwarning, set[str]()

    def log_once(message: Warning | str, *where: Any, **more: Any) -> None:
        """Log a warning once, without its source line."""
        if str(message) not in logged:
            logged.add(str(message))
            logger.warning("%s", message)

    warnings.showwarning = log_once
    try:
        with visible(console) as progress:
            bars: dict[str, Any] = {}

            def on_progress(what: str, n: int, total: int) -> None:
                if what not in bars:
                    bars[what] = progress.add_task(what, total=total or None)
                progress.advance(bars[what], n)

            yield on_progress
    finally:
        warnings.showwarning = showwarning
        logger.removeHandler(handler)


def importing() -> Any:
    """Show a status line during slow imports."""
    return Console(stderr=True, quiet=not sys.stderr.isatty()).status("importing torch and transformers")
