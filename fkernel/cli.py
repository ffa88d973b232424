"""The command line: parse, delegate, and say in one line what the user can mend.

Exit codes: 0 done; 2 the user's mistake; 1 ours, a demo whose prediction missed its bounds, or a memory grant that
nothing fits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
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
    with _said():
        missed = _demo(Console(), out, cache, seed, rows)
    for line in missed:
        _complain(f"the prediction missed its bounds: {line}")
    if missed:
        raise typer.Exit(1)


@app.command()
def estimate(
    model: Annotated[str, typer.Argument(help="A directory with config.json, or a shape: hidden_size=896,…")],
    n_u: Annotated[int, typer.Option("--n-u", help="Update sequences.")] = 32,
    n_e: Annotated[int, typer.Option("--n-e", help="Evaluation sequences.")] = 16,
    tokens: Annotated[int, typer.Option(help="Tokens of each sequence, prompt and response together.")] = 128,
    memory: Annotated[str | None, typer.Option(help="Grant beside the model, such as 8GiB (default: none).")] = None,
    store: Annotated[bool, typer.Option("--store", help="Gradients may be stored on disk.")] = False,
    dtype: Annotated[str, typer.Option(help="The parameters' dtype: float32 or float64.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Predict memory, disk and time of a kernel, without loading any weights.

    Example: fkernel estimate path/to/model --n-u 32 --n-e 16 --tokens 128 --memory 8GiB
    """
    with _said():
        feasible = _estimate(model, n_u, n_e, tokens, memory, store, dtype, as_json)
    if not feasible:
        raise typer.Exit(1)


@app.command()
def sample(
    plan: Annotated[Path, typer.Argument(help="A sample plan, YAML or JSON (see the documentation of fkernel.study).")],
    rows: Annotated[int, typer.Option(help="Sequences to show in the table.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print the batch's diagnostics as JSON.")] = False,
) -> None:
    """Draw one batch of a checkpoint, score it, and save it to a directory.

    Example: fkernel sample update.yaml
    """
    with _said():
        _sample(plan, rows, as_json)


@contextmanager
def _said() -> Iterator[None]:
    """Say a mistake in one line, and exit."""
    from fkernel.errors import DemoError, FKernelError  # here, so that --help does not wait for torch

    try:
        yield
    except (FKernelError, OSError) as error:
        _complain(str(error))
        raise typer.Exit(1 if isinstance(error, DemoError) else 2) from error


def _complain(text: str) -> None:
    Console(stderr=True).print(f"fkernel: {text}", style="red", markup=False, highlight=False, soft_wrap=True)


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


def _sample(path: Path, rows: int, as_json: bool) -> None:
    with Console(stderr=True).status("importing torch and transformers"):
        from fkernel import report
        from fkernel.demo.progress import visible
        from fkernel.study import SamplePlan, read_plan, sampled

    plan = read_plan(path, SamplePlan)
    with visible(Console(stderr=True)) as progress:
        bar = progress.add_task("sampling", total=None)
        batch = sampled(plan, lambda n: progress.advance(bar, n))
    if as_json:
        typer.echo(json.dumps({"out": plan.out, **batch.diagnostics}, indent=1))
        return
    console = Console()
    wide = console if console.width >= 120 or console.is_terminal else Console(width=140)
    wide.print(report.batch_table(batch, rows))
    for line in (*report.batch_lines(batch.diagnostics), f"Wrote {plan.out}"):
        console.print(line, highlight=False, soft_wrap=True)


def _estimate(
    model: str, n_u: int, n_e: int, tokens: int, memory: str | None, store: bool, dtype: str, as_json: bool
) -> bool:
    """Print an estimate; tell whether anything is feasible."""
    from fkernel.errors import BatchError, ModelError

    for option, given, least in (("--n-u", n_u, 1), ("--n-e", n_e, 1), ("--tokens", tokens, 2)):
        if given < least:
            raise BatchError(f"{option} is {given}; expected at least {least}.")
    if dtype not in ("float32", "float64"):
        raise ModelError(f"--dtype is {dtype!r}; fkernel differentiates in float32 or float64.")
    with Console(stderr=True).status("counting what the model does, and measuring this machine once"):
        import torch

        from fkernel import report
        from fkernel.checkpoint import estimate_model

        found = estimate_model(model, n_u, n_e, tokens, memory=memory, store=store, dtype=getattr(torch, dtype))
    if as_json:
        typer.echo(json.dumps(report.estimate_record(found), indent=1))
    else:
        console = Console()
        wide = console if console.width >= 100 or console.is_terminal else Console(width=100)
        wide.print(report.estimate_table(found))
        if found.chosen:
            wide.print(report.estimate_line(found), highlight=False, soft_wrap=True)
    if not found.chosen:
        _complain(report.estimate_line(found))
    return found.chosen is not None
