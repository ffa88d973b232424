"""What a run of a plan will take, for a terminal and for a program."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from fkernel.report.estimate import duration, size
from fkernel.study import Forecast


def forecast_table(found: Forecast) -> Table:
    """Tabulate the phases of a run: memory beside the model and the optimizer's moments, disk, predicted time.

    Args:
        found: what `fkernel.study.forecast` returned.
    """
    granted = "no memory grant" if found.grant is None else f"memory grant {size(found.grant)}"
    table = Table(title=f"{found.parameters:,} parameters; {granted}")
    for name in ("phase", "sequences", "tokens", "memory", "disk", "time"):
        table.add_column(name, justify="left" if name == "phase" else "right", no_wrap=True)
    for phase in found.phases:
        numbers = str(phase.sequences), str(phase.tokens), size(phase.memory), size(phase.disk) if phase.disk else "–"
        table.add_row(phase.name, *numbers, duration(phase.seconds))
    return table


def forecast_lines(found: Forecast) -> list[str]:
    """Say what the whole run takes, and what was assumed.

    Args:
        found: what `fkernel.study.forecast` returned.
    """
    disk = f", {size(found.disk)} of disk" if found.disk else ""
    whole = f"{size(found.memory)} of memory at most, {size(found.model)} of it model and optimizer's moments"
    return [f"In all {duration(found.seconds)}{disk}; {whole}.", *(f"Assumed: {each}." for each in found.assumed)]


def forecast_record(found: Forecast) -> dict[str, Any]:
    """Return the same as numbers and strings that JSON holds; bytes and seconds.

    Args:
        found: what `fkernel.study.forecast` returned.
    """
    phases = [{**phase._asdict(), "strategy": phase.strategy._asdict()} for phase in found.phases]
    totals = {"memory": found.memory, "disk": found.disk, "seconds": found.seconds}
    return {**found._asdict(), "phases": phases, "assumed": [*found.assumed], **totals}
