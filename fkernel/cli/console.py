"""How the commands speak: mistakes in one line, exit codes, bars that draw where a person looks."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Say a mistake in one line, and exit: 2 where the user can mend it, 1 where it is ours, 130 after Ctrl-C."""
    from fkernel.errors import DemoError, FKernelError  # here, so that --help does not wait for torch

    try:
        yield
    except KeyboardInterrupt:
        print_error("stopped. What is complete is kept; the same command goes on from there.")
        raise typer.Exit(130) from None
    except (FKernelError, OSError) as error:
        print_error(str(error))
        raise typer.Exit(1 if isinstance(error, DemoError) else 2) from error


def print_error(text: str) -> None:
    """Say what is wrong on stderr."""
    Console(stderr=True).print(f"fkernel: {text}", style="red", markup=False, highlight=False, soft_wrap=True)


def wide(least: int) -> Console:
    """A console for tables: as wide as the terminal, or as a table needs where the output is a file."""
    console = Console()
    return console if console.width >= least or console.is_terminal else Console(width=least)


@contextmanager
def progress_and_log(level: str) -> Iterator[Callable[[str, int, int], Any]]:
    """Show what a runner does: its log on stderr at a level, and a bar for what it counts."""
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
    shown, heard = warnings.showwarning, set[str]()

    def show(message: Warning | str, *where: Any, **more: Any) -> None:
        """Say a warning once, as a line of the log: where in the library it was raised helps nobody here."""
        if str(message) not in heard:
            heard.add(str(message))
            logger.warning("%s", message)

    warnings.showwarning = show
    try:
        with visible(console) as progress:
            bars: dict[str, Any] = {}

            def on_progress(what: str, n: int, total: int) -> None:
                if what not in bars:
                    bars[what] = progress.add_task(what, total=total or None)
                progress.advance(bars[what], n)

            yield on_progress
    finally:
        warnings.showwarning = shown
        logger.removeHandler(handler)


def importing() -> Any:
    """Say that the slow imports are under way."""
    return Console(stderr=True, quiet=not sys.stderr.isatty()).status("importing torch and transformers")
