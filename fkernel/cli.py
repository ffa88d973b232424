"""The command line: parse, delegate, and say in one line what the user can mend.

Exit codes: 0 done; 2 the user's mistake; 1 ours, or a demo whose prediction missed its bounds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    help="fkernel: why did this sequence's probability move? One AdamW step, explained in nats.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

BOUNDS = {"first_order": 0.02, "second_order": 0.003}
"""Largest relative error of the demo's prediction, against the step really taken."""


@app.callback()
def main() -> None:
    """Keep `demo` a subcommand while it is the only one."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for the results and the pictures.")] = Path("demo-out"),
    cache: Annotated[
        Path | None, typer.Option(help="Where policies are kept (default: $FKERNEL_CACHE or ~/.cache/fkernel).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the policy, its training and its sampling.")] = 0,
    rows: Annotated[int, typer.Option(help="Sequences to show in the table.")] = 10,
) -> None:
    """Train a small policy, take real RL steps with AdamW, and explain the last one.

    Example: fkernel demo --out demo-out
    """
    console = Console()
    from fkernel.errors import DemoError, FKernelError  # here, so that --help does not wait for torch

    try:
        missed = _demo(console, out, cache, seed, rows)
    except (FKernelError, OSError) as error:
        Console(stderr=True).print(f"fkernel: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1 if isinstance(error, DemoError) else 2) from error
    for line in missed:
        Console(stderr=True).print(f"fkernel: the prediction missed its bounds: {line}", style="red", markup=False)
    if missed:
        raise typer.Exit(1)


def _demo(console: Console, out: Path, cache: Path | None, seed: int, rows: int) -> list[str]:
    with console.status("importing torch and transformers"):
        from fkernel import report
        from fkernel.demo import prepare, seeded
        from fkernel.demo.explain import explain
        from fkernel.demo.progress import visible

    with visible(console) as progress:
        directory = prepare(seeded(seed), cache, progress)
        results = explain(directory, progress)
    results.save(out)
    report.heatmap(results, out / "heatmap.png")
    report.predicted_vs_realised(results, out / "predicted_vs_realised.png")
    wide = console if console.width >= 132 or console.is_terminal else Console(width=140)
    wide.print(report.effects_table(results, rows))
    wide.print(report.calibration_table(results))
    names = ", ".join(("results.json", "kernel.npz", "heatmap.png", "predicted_vs_realised.png"))
    console.print(f"Wrote {out}: {names}", highlight=False)
    missed = []
    for name, bound in BOUNDS.items():
        value = results.calibration[name]
        if value.pearson < 0.9999 or abs(value.slope - 1) > 0.02 or value.relative_error > bound:
            missed.append(f"{name} {value}, bounds r ≥ 0.9999, slope 1 ± 0.02, relative error ≤ {bound}")
    return missed
