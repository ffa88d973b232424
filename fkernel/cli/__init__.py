"""The command line.

Exit codes: 0 done; 2 a user error; 1 a failed demo or one whose prediction missed its bounds, or a memory limit that no
strategy fits; 130 stopped by Ctrl-C, and the same command resumes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fkernel.cli import explaining, page, questions, runs, showing, study
from fkernel.cli.console import (
    Terminal,
    exit_on_error,
    importing,
    path_option,
    print_error,
    print_line,
    progress_and_log,
    wide,
)
from fkernel.cli.pairs import WithPairs
from fkernel.cli.ranks import Processes, joined, started
from fkernel.cli.writing import execute

app = typer.Typer(
    help="fkernel: why did this sequence's probability move? One AdamW step, explained in nats.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

BOUNDS = {"predicted": 0.002}
"""Largest relative error of the demo's prediction of the realised change."""


@app.command()
def demo(
    out: Annotated[Path, path_option("Directory for the results and the pictures.")] = Path("demo-out"),
    cache: Annotated[
        Path | None, typer.Option(help="Cache of policies (default: $FKERNEL_CACHE or ~/.cache/fkernel).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the policy, its training and its sampling.")] = 0,
    rows: Annotated[int, typer.Option(help="Print tables, too, with so many sequences of each request.")] = 0,
    processes: Processes = None,
) -> None:
    """Train a small policy, take real RL steps with AdamW, and explain the last one.

    Example: fkernel demo --out demo-out
    """
    with exit_on_error():
        missed = _demo(out, cache, seed, rows, processes)
    for line in missed:
        print_error(f"the prediction missed its bounds: {line}")
    if missed:
        raise typer.Exit(1)


for command in (explaining.explain, questions.ask, questions.query):
    app.command(cls=WithPairs)(command)
for command in (study.run, page.report, questions.influence, showing.show, runs.account, runs.replay):
    app.command()(command)
app.add_typer(study.plan_app, name="plan")
app.add_typer(runs.recording_app, name="recording")


@app.command()
def estimate(
    model: Annotated[
        str, typer.Argument(help="A directory with config.json, or a shape: hidden_size=896,…; or a study's plan.")
    ],
    n_u: Annotated[int, typer.Option("--n-u", help="Update sequences.")] = 32,
    n_e: Annotated[int, typer.Option("--n-e", help="Evaluation sequences.")] = 16,
    tokens: Annotated[int, typer.Option(help="Tokens of each sequence, prompt and response together.")] = 128,
    memory: Annotated[str | None, typer.Option(help="Grant beside the model, such as 8GiB (default: none).")] = None,
    store: Annotated[bool, typer.Option("--store", help="Gradients may be stored on disk.")] = False,
    dtype: Annotated[str, typer.Option(help="The parameters' dtype: float32 or float64.")] = "float32",
    processes: Annotated[int | None, typer.Option(help="Ranks, for what a step costs each of them.")] = None,
    gpu: Annotated[str, typer.Option(help="What each rank has: a100, h100 or h200.")] = "h100",
    sharded: Annotated[bool, typer.Option(help="With --processes: the parameters are in shards too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Predict memory, disk and time of a kernel, without loading any weights; or of `fkernel run PLAN`.

    Example: fkernel estimate path/to/model --n-u 32 --n-e 16 --tokens 128 --memory 8GiB

    Example: fkernel estimate path/to/model --n-u 512 --n-e 64 --tokens 2048 --processes 64 --gpu h100

    Example: fkernel estimate study.yaml --memory 8GiB

    For a plan the weights are loaded, and the options that describe a kernel are ignored.
    """
    with exit_on_error():
        if Path(model).is_file():
            study.say_forecast(Path(model), memory, as_json)
            return
        if processes is not None:
            _on_ranks(model, n_u, n_e, tokens, dtype, processes, gpu, sharded, as_json)
            return
        feasible = _estimate(model, n_u, n_e, tokens, memory, store, dtype, as_json)
    if not feasible:
        raise typer.Exit(1)


@app.command()
def sample(
    plan: Annotated[Path, typer.Argument(help="A sample plan, YAML or JSON (see the documentation of fkernel.study).")],
    rows: Annotated[int, typer.Option(help="Sequences to show in the table.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print the batch's diagnostics as JSON.")] = False,
) -> None:
    """Sample one batch from a checkpoint, score it, and save it to a directory.

    Example: fkernel sample update.yaml
    """
    with exit_on_error():
        _sample(plan, rows, as_json)


def _demo(out: Path, cache: Path | None, seed: int, rows: int, processes: int | None) -> list[str]:
    """Prepare the policy and run the package's plan; returns the bounds that the prediction missed."""
    with importing():
        from fkernel.demo import demo_plan, prepare, seeded, visible
        from fkernel.distributed import from_first, group_of
        from fkernel.io import check_writable

    check_writable(out)  # before minutes of training
    mesh = joined("cpu")
    if mesh is None:
        with visible(Terminal(stderr=True)) as progress:
            directory = prepare(seeded(seed), cache, progress)
    else:
        directory = from_first(group_of(mesh), "preparing the policy", lambda: prepare(seeded(seed), cache))
    if started(processes):  # the ranks find the policy in the cache
        return []
    results = execute(demo_plan(directory, out, seed), overwrite=False, log="minimal", mesh=mesh)
    if results is None:
        return []
    study.finish(results, out, rows, as_json=False)
    missed, calibration = [], results["held_out"].calibration
    for name, bound in BOUNDS.items():
        value = calibration[name]
        if value.pearson < 0.9999 or abs(value.slope - 1) > 0.02 or value.relative_error > bound:
            missed.append(f"{name} {value}, bounds r ≥ 0.9999, slope 1 ± 0.02, relative error ≤ {bound}")
    return missed


def _sample(path: Path, rows: int, as_json: bool) -> None:
    with importing():
        from fkernel import report
        from fkernel.study import SamplePlan, read_plan, sampled

    plan = read_plan(path, SamplePlan)
    with progress_and_log("minimal") as on_progress:
        batch = sampled(plan, lambda n: on_progress("sampling", n, 2 * plan.request.size))
    if as_json:
        typer.echo(json.dumps({"out": plan.out, **batch.diagnostics}, indent=1))
        return
    wide(120).print(report.batch_table(batch, rows))
    for line in (*report.batch_lines(batch.diagnostics), f"Wrote {plan.out}"):
        print_line(line)


def _on_ranks(
    model: str, n_u: int, n_e: int, tokens: int, dtype: str, processes: int, gpu: str, sharded: bool, as_json: bool
) -> None:
    """Print what a step costs each of several ranks."""
    from fkernel.errors import ModelError

    with Terminal(stderr=True).status("counting what the model does"):
        import torch

        from fkernel import report
        from fkernel.checkpoint import skeleton_of, workload_of
        from fkernel.engine.planning import GPUS, cost_in_shards, cost_on_ranks

        if gpu not in GPUS:
            raise ModelError(f"--gpu is {gpu!r}; expected {', '.join(GPUS)}.")
        if dtype not in ("float32", "float64"):
            raise ModelError(f"--dtype is {dtype!r}; fkernel differentiates in float32 or float64.")
        bones = skeleton_of(model, tokens, getattr(torch, dtype))
        predicted = cost_in_shards if sharded else cost_on_ranks
        cost = predicted(workload_of(bones, n_u, n_e, whole=False), processes)
    if as_json:
        typer.echo(json.dumps(report.ranks_record(cost, GPUS[gpu]), indent=1))
    else:
        wide(80).print(report.ranks_table(cost, GPUS[gpu]))


def _estimate(
    model: str, n_u: int, n_e: int, tokens: int, memory: str | None, store: bool, dtype: str, as_json: bool
) -> bool:
    """Print an estimate; returns whether any strategy is feasible."""
    from fkernel.errors import BatchError, ModelError

    for option, given, least in (("--n-u", n_u, 1), ("--n-e", n_e, 1), ("--tokens", tokens, 2)):
        if given < least:
            raise BatchError(f"{option} is {given}; expected at least {least}.")
    if dtype not in ("float32", "float64"):
        raise ModelError(f"--dtype is {dtype!r}; fkernel differentiates in float32 or float64.")
    with Terminal(stderr=True).status("counting what the model does, and measuring this machine once"):
        import torch

        from fkernel import report
        from fkernel.checkpoint import estimate_model

        prediction = estimate_model(model, n_u, n_e, tokens, memory=memory, store=store, dtype=getattr(torch, dtype))
    if as_json:
        typer.echo(json.dumps(report.estimate_record(prediction), indent=1))
    else:
        console = wide(100)
        console.print(report.estimate_table(prediction))
        if prediction.chosen:
            console.print(report.estimate_line(prediction), highlight=False, soft_wrap=True)
    if not prediction.chosen:
        print_error(report.estimate_line(prediction))
    return prediction.chosen is not None
