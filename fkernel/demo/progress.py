"""Progress bars: visible and silent ones."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def silent() -> Progress:
    """Progress bars that are not drawn."""
    return Progress(disable=True)


def visible(console: Console | None = None) -> Progress:
    """Progress bars with description, count and elapsed time. A context manager."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
