"""Progress bars: a real one for people, a silent one for tests."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def silent() -> Progress:
    """A progress that draws nothing, so that no function needs to ask whether it has one."""
    return Progress(disable=True)


def visible(console: Console | None = None) -> Progress:
    """The demo's bars: what is running and its numbers, how far, for how long. A context manager."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
