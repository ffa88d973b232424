"""Progress bars: visible and silent ones."""

from collections.abc import Iterable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeElapsedColumn
from rich.table import Table

LEAST = 1.0
"""Seconds from which on something is shown."""


def silent() -> Progress:
    """Progress bars that are not drawn."""
    return Progress(disable=True)


class Lasting(Progress):
    """Progress bars of what takes some time; what is done at once is not shown."""

    def stop(self) -> None:
        """Stop; in a file the bars end with a line of their own, where there are any."""
        self.live.stop()
        if not self.console.is_interactive and self.make_tasks_table(self.tasks).row_count:
            self.console.print()

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        """Leave out tasks that took less than a second."""
        lasted = [(task, task.finished_time if task.finished else task.elapsed) for task in tasks]
        return super().make_tasks_table([task for task, seconds in lasted if (seconds or 0.0) >= LEAST])


def visible(console: Console | None = None) -> Progress:
    """Progress bars with description, count and elapsed time. A context manager."""
    return Lasting(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
