"""Forecasts as tables and as JSON."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from fkernel.report.estimate import duration, size
from fkernel.study import Forecast


def forecast_table(forecast: Forecast) -> Table:
    """Tabulate the phases of a run: memory beside the model and the optimizer's moments, disk, predicted time.

    Args:
        forecast: what `fkernel.study.forecast` returned.
    """
    granted = "no memory grant" if forecast.grant is None else f"memory grant {size(forecast.grant)}"
    table = Table(title=f"{forecast.parameters:,} parameters; {granted}")
    for name in ("phase", "sequences", "tokens", "memory", "disk", "time"):
        table.add_column(name, justify="left" if name == "phase" else "right", no_wrap=True)
    for phase in forecast.phases:
        numbers = str(phase.sequences), str(phase.tokens), size(phase.memory), size(phase.disk) if phase.disk else "–"
        table.add_row(phase.name, *numbers, duration(phase.seconds))
    return table


def forecast_lines(forecast: Forecast) -> list[str]:
    """Totals of the run, and assumptions.

    Args:
        forecast: what `fkernel.study.forecast` returned.
    """
    disk = f", {size(forecast.disk)} of disk" if forecast.disk else ""
    whole = f"{size(forecast.memory)} of memory at most, {size(forecast.model)} of it model and optimizer's moments"
    beside = f" and the analyses {', '.join(forecast.uncounted)}, whose time is unknown" if forecast.uncounted else ""
    lines = [f"{duration(forecast.seconds)} for gradients and kernels{beside}{disk}; {whole}."]
    return [*lines, *(f"Assumed: {each}." for each in forecast.assumed)]


def forecast_record(forecast: Forecast) -> dict[str, Any]:
    """The forecast as JSON; bytes and seconds.

    Args:
        forecast: what `fkernel.study.forecast` returned.
    """
    phases = [{**phase._asdict(), "strategy": phase.strategy._asdict()} for phase in forecast.phases]
    totals = {"memory": forecast.memory, "disk": forecast.disk, "seconds": forecast.seconds}
    return {**forecast._asdict(), "phases": phases, "assumed": [*forecast.assumed], **totals}
