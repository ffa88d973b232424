"""Estimates as tables and as JSON."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from fkernel.engine import Estimate, Option
from fkernel.engine.planning import Gpu, RanksCost


def estimate_table(estimate: Estimate) -> Table:
    """Tabulate the strategies: memory, disk, predicted time, and whether each is feasible.

    Args:
        estimate: what `fkernel.estimate` returned.
    """
    load = estimate.workload
    n_U, n_E = (len(load.tokens[side]) for side in ("U", "E"))
    granted = "no memory grant" if estimate.budget is None else f"memory grant {size(estimate.budget)}"
    model = f"{load.size:,} parameters of {load.itemsize} bytes"
    table = Table(title=f"{n_U} × {n_E} sequences of {load.longest} tokens\n{model}; {granted}")
    for name in ("strategy", "memory", "disk", "time", "feasible"):
        table.add_column(name, justify="left" if name in ("strategy", "feasible") else "right", no_wrap=True)
    for option in estimate.options:
        chosen = estimate.chosen is not None and option.name == estimate.chosen.name
        disk = size(option.disk) if option.disk else "–"
        feasible = _feasible(option, estimate.budget) + (", chosen" if chosen else "")
        style = "bold" if chosen else ("dim" if option.infeasible_reason else None)
        table.add_row(option.name, size(option.memory), disk, duration(option.seconds), feasible, style=style)
    return table


def estimate_line(estimate: Estimate) -> str:
    """The chosen strategy and why, or what would be needed."""
    if estimate.chosen is None:
        return estimate.reason
    cost = f"{size(estimate.chosen.memory)} beside the model, {duration(estimate.chosen.seconds)}"
    return f"Chosen: {estimate.chosen.name} ({cost}): {estimate.reason}."


def estimate_record(estimate: Estimate) -> dict[str, Any]:
    """The estimate as JSON; bytes and seconds."""
    return {
        "parameters": estimate.workload.size,
        "itemsize": estimate.workload.itemsize,
        "n_U": len(estimate.workload.tokens["U"]),
        "n_E": len(estimate.workload.tokens["E"]),
        "tokens": estimate.workload.longest,
        "budget": estimate.budget,
        "options": [_record(option) for option in estimate.options],
        "chosen": None if estimate.chosen is None else _record(estimate.chosen),
        "reason": estimate.reason,
        "rates": estimate.rates._asdict(),
    }


def ranks_table(cost: RanksCost, gpu: Gpu) -> Table:
    """Tabulate what an explained step costs each of several ranks, beside what a GPU has.

    Args:
        cost: what `cost_on_ranks` returned.
        gpu: what one is taken to sustain.
    """
    memory, sent = sum(cost.memory.values()), sum(cost.sent.values())
    table = Table(title=f"A step on {cost.ranks} ranks, layer by layer: each rank's")
    for name in ("what", "of it", "amount"):
        table.add_column(name, justify="right" if name == "amount" else "left", no_wrap=True)
    for what, amount in cost.memory.items():
        table.add_row("memory", what, size(amount))
    fits = "fits" if memory <= gpu.memory else f"does not fit into {size(gpu.memory)}"
    table.add_row("memory", f"in all: {fits}", size(memory), style="bold")
    for what, amount in cost.sent.items():
        table.add_row("on the wire", what, size(amount))
    table.add_row("compute", f"at {gpu.flops / 1e12:.0f} TFLOP/s", duration(cost.flops / gpu.flops))
    table.add_row("send", f"at {gpu.wire / 1e9:.0f} GB/s", duration(sent / gpu.wire))
    return table


def ranks_record(cost: RanksCost, gpu: Gpu) -> dict[str, Any]:
    """The same as JSON; bytes, operations and seconds."""
    fits = sum(cost.memory.values()) <= gpu.memory
    return {**cost._asdict(), "gpu": gpu._asdict(), "seconds": cost.seconds(gpu), "fits": fits}


def size(count: float) -> str:
    """Format a number of bytes.

    Example:
        >>> size(8 * 2**30), size(1536), size(12)
        ('8.00 GiB', '1.50 KiB', '12 B')
    """
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 2**power:
            return f"{count / 2**power:.2f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Format seconds.

    Example:
        >>> duration(0.01234), duration(90), duration(600), duration(9000)
        ('0.0123 s', '90 s', '10.0 min', '2.5 h')
    """
    if seconds >= 7200:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.3g} s"


def _feasible(option: Option, budget: int | None) -> str:
    if not option.infeasible_reason:
        return "yes"
    return (
        f"no: needs {size(option.needs)}"
        if budget is not None and option.needs > budget
        else f"no: {option.infeasible_reason}"
    )


def _record(option: Option) -> dict[str, Any]:
    return {
        "name": option.name,
        "memory": option.memory,
        "needs": option.needs,
        "disk": option.disk,
        "seconds": option.seconds,
        "feasible": not option.infeasible_reason,
        "infeasible_reason": option.infeasible_reason,
        "strategy": option.strategy._asdict(),
    }
