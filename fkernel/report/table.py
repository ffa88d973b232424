"""What happened, for a terminal."""

from __future__ import annotations

import numpy as np
from rich.markup import escape
from rich.table import Table

from fkernel.study import SequenceInfo, StepResults


def effects_table(results: StepResults, rows: int = 10) -> Table:
    """Tabulate the evaluation sequences that moved most: predicted change, its parts, realised, top contributors.

    Args:
        results: finished results.
        rows: sequences to show, by the size of their realised change.

    Returns:
        A rich table; all changes in thousandths of a nat.
    """
    table = Table(title=f"The {min(rows, len(results.evaluation))} sequences that moved most (10⁻³ nats)")
    table.add_column("sequence", no_wrap=True)
    for name in ("predicted ΔS", "batch", "momentum", "decay", "curvature", "realised ΔS"):
        table.add_column(name, justify="right", style="bold" if "ΔS" in name else None)
    table.add_column("top three contributors", no_wrap=True)
    for row in np.argsort(-np.abs(results.realised), kind="stable")[:rows]:
        info = results.evaluation[row]
        effects = (results.second_order, results.batch, results.momentum, results.decay, results.curvature)
        changes = [f"{1e3 * values[row]:+.2f}" for values in (*effects, results.realised)]
        culprits = [f"{1e3 * nats:+.2f}  {_text(u)}" for u, nats in results.top_contributors(int(row))]
        table.add_row(f"{_text(info)}\nS = {info.logprob:.2f} nats", *changes, "\n".join(culprits), end_section=True)
    return table


def calibration_table(results: StepResults) -> Table:
    """Tabulate the prediction against the step really taken: correlation, slope and relative error."""
    table = Table(title="Predicted against the step really taken")
    for name in ("prediction", "Pearson r", "slope", "relative error"):
        table.add_column(name, justify="left" if name == "prediction" else "right")
    labels = {
        "batch": "K·A alone",
        "first_order": "batch + momentum + decay",
        "second_order": "… + curvature ½ΔθᵀHΔθ",
    }
    for name, value in results.calibration.items():
        table.add_row(labels[name], f"{value.pearson:.6f}", f"{value.slope:.4f}", f"{value.relative_error:.3%}")
    return table


def _text(info: SequenceInfo) -> str:
    reward = "" if info.reward is None else (" ✓" if info.reward > 0 else " ✗")
    return escape(f"{info.id} {info.prompt}{info.response}{reward}")
