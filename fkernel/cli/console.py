"""Error messages, exit codes, progress bars and consoles of the commands."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from textwrap import wrap
from typing import Annotated, Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from fkernel.errors import visible_text

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


class Terminal(Console):
    """A console that shows control characters of texts and paths as escapes, and makes links of none."""

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        """Render something, with its control characters visible."""
        for segment in super().render(renderable, options):
            style = segment.style.update_link(None) if segment.style and segment.style.link else segment.style
            yield segment if segment.control else Segment(visible_text(segment.text), style)


def print_line(text: str, style: str = "", stderr: bool = False) -> None:
    """Print a line that holds paths or texts: nothing in it is markup."""
    Terminal(stderr=stderr).print(text, style=style, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Print an error in one line and exit: 2 for user errors, 1 for a failed demo, 130 after Ctrl-C."""
    from fkernel.errors import DemoError, FKernelError  # imported here to keep --help fast
    from fkernel.io import explained

    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for rewards and other functions that a plan names; installed packages come first
    try:
        yield
    except KeyboardInterrupt:
        print_error("stopped. What is complete is kept; the same command computes the rest.")
        raise typer.Exit(130) from None
    except (FKernelError, OSError) as error:
        if not (getattr(error, "of_all_ranks", False) and int(os.environ.get("RANK", "0"))):
            # Of an error that all ranks raise, rank 0 tells.
            print_error(explained(error) if isinstance(error, OSError) else str(error))
        raise typer.Exit(1 if isinstance(error, DemoError) else 2) from error


def print_error(text: str) -> None:
    """Print an error message to stderr."""
    print_line(f"fkernel: {text}", style="red", stderr=True)


def path_option(help: str) -> Any:
    """Make an option of a path; an empty one, which would be the current folder, is refused."""

    def parsed(text: str | Path) -> Path:  # a default comes here too, as the Path that it is
        if not str(text).strip():
            raise typer.BadParameter("it is empty; expected the path of a file or a directory.")
        return Path(text)

    return typer.Option(help=help, parser=parsed, metavar="<path>")


def can_draw() -> bool:
    """Whether pictures can be drawn; else say in a line that they are left out."""
    there = find_spec("matplotlib") is not None
    if not there:
        text = "pictures are left out: matplotlib is not installed (pip install 'fkernel[report]')"
        print_line(text, stderr=True)
    return there


ROOMY = Terminal(width=10_000)
"""On which a table takes all the room that it would like."""
READABLE = 16
"""Columns of a terminal that a text needs at least, to be more than a stack of syllables."""


class Tables(Terminal):
    """A console whose tables never cut a number: texts give way, and then each row is printed as a list."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print, with the columns of numbers as wide as their numbers."""
        shown = (uncut(each, self.width) if isinstance(each, Table) else each for each in objects)
        super().print(*shown, **{"crop": False, **options})


def uncut(table: Table, width: int) -> Table:
    """A table whose right-aligned columns keep their width; a list of its rows where that leaves no room for texts.

    Args:
        table: any.
        width: of the terminal.

    Example:
        >>> table = Table("probe", box=None)
        >>> table.add_column("realised", justify="right")
        >>> table.add_row("88", "-65.43")
        >>> Terminal(width=30).print(uncut(table, 30))
         probe  realised
         88       -65.43
        >>> Terminal(width=18).print(uncut(table, 18))
         probe     88
         realised  -65.43
    """
    needed, headings = 1, list[tuple[Column, str]]()
    for column in table.columns:
        texts = [Text.from_markup(cell) if isinstance(cell, str) else cell for cell in column.cells]
        widest = max(
            (max(map(cell_len, text.plain.split("\n"))) for text in texts if isinstance(text, Text)), default=1
        )
        if column.justify == "right":
            word = max(map(len, str(column.header).split()), default=1)
            column.no_wrap, column.min_width = True, max(widest, word)
            needed += column.min_width + 3
            headings.append((column, "\n".join(wrap(str(column.header), column.min_width))))
        else:
            column.no_wrap, column.overflow = False, "fold"
            needed += min(max(widest, len(str(column.header))), READABLE) + 3
    if needed > width and table.rows:
        return _listed(table)
    if Measurement.get(ROOMY, ROOMY.options, table).maximum > width:  # texts get what the headings would take
        for column, heading in headings:
            column.header = heading
    return table


def _listed(table: Table) -> Table:
    """A table's rows one below the other, a line for each column."""
    rows = Table(title=table.title, caption=table.caption, show_header=False, box=table.box)
    rows.add_column(no_wrap=True)
    rows.add_column(overflow="fold")
    columns = [[*column.cells] for column in table.columns]
    for row in range(len(table.rows)):
        for column, cells in zip(table.columns, columns, strict=True):
            rows.add_row(column.header, cells[row])
        rows.add_section()
    return rows


def wide(least: int) -> Tables:
    """A console for tables: as wide as the terminal; at least `least` where the output is a file."""
    console = Tables()
    return console if console.width >= least or console.is_terminal else Tables(width=least)


@contextmanager
def progress_and_log(level: str) -> Iterator[Callable[[str, int, int], Any]]:
    """Show a runner's log on stderr at a level, and a progress bar per phase."""
    from rich.logging import RichHandler

    from fkernel.demo import visible
    from fkernel.errors import PlanError
    from fkernel.study import LEVELS

    if level not in LEVELS:
        raise PlanError(f"--log is {level!r}; expected {', '.join(LEVELS)}.")
    console, logger = Terminal(stderr=True), logging.getLogger("fkernel")
    handler = RichHandler(console=console, show_path=False, show_level=False, log_time_format="%H:%M:%S", markup=False)
    handler.setLevel(LEVELS[level])
    logger.addHandler(handler)
    logger.setLevel(min(LEVELS[level], logging.INFO))
    showwarning, logged = warnings.showwarning, set[str]()

    def log_once(message: Warning | str, category: Any = None, *where: Any, **more: Any) -> None:
        """Log a warning once, without its source line; one of another library is for debugging."""
        if str(message) not in logged:
            logged.add(str(message))
            ours = getattr(category, "__module__", "").startswith("fkernel")
            logger.log(logging.WARNING if ours else logging.DEBUG, "%s", message)

    warnings.showwarning = log_once
    try:
        with visible(console) as progress:
            bars, done, earlier = dict[str, Any](), Counter[str](), Counter[str]()

            def on_progress(what: str, n: int, total: int) -> None:
                if what not in bars:
                    bars[what] = progress.add_task(what, total=total or None)
                elif not n and not total:  # the same phase of another request
                    earlier[what] = done[what]
                done[what] += n
                progress.update(bars[what], advance=n, total=earlier[what] + total or None)

            yield on_progress
    finally:
        warnings.showwarning = showwarning
        logger.removeHandler(handler)


def importing() -> Any:
    """Show a status line during slow imports."""
    return Terminal(stderr=True, quiet=not sys.stderr.isatty()).status("importing torch and transformers")
