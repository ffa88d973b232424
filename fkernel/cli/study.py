"""Commands of studies: `fkernel run | query | influence | show | plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fkernel.cli.console import exit_on_error, importing, wide
from fkernel.cli.ranks import joined, started
from fkernel.cli.writing import execute

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Workspace = Annotated[Path, typer.Argument(help="A workspace that `fkernel run` made: OUT/workspace.")]

plan_app = typer.Typer(help="Write, check and describe plans.", no_args_is_help=True)


def run(
    plan: Annotated[Path, typer.Argument(help="A plan, YAML or JSON; `fkernel plan init` writes one.")],
    out: Annotated[Path | None, typer.Option(help="Directory for the results, instead of the plan's.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace results that another plan left there.")] = False,
    rows: Annotated[int, typer.Option(help="Sequences to show of each request.")] = 5,
    log: Annotated[str, typer.Option(help="Log level: minimal, normal, detailed or debug.")] = "normal",
    processes: Annotated[
        int | None, typer.Option(help="Ranks that compute together, on this machine (default: the plan's, or one).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a plan and save its results.

    Example: fkernel run study.yaml

    After an interruption the same command resumes the run. Under torchrun it joins the ranks that are there.
    """
    with exit_on_error():
        with importing():
            from fkernel.study import FisherKernelPlan, as_recorded, read_plan
        loaded = as_recorded(read_plan(plan, FisherKernelPlan))
        if out is not None:
            loaded = loaded.model_copy(update={"out": str(out)})
        if started(processes or loaded.numerics.processes):
            return
        results = execute(loaded, overwrite, log, joined(loaded.numerics.device))
        if results is None:
            return
        if as_json:
            typer.echo(json.dumps(summary(results, loaded.out), indent=1))
        else:
            show_results(results, rows)
            Console().print(f"Wrote {loaded.out}", highlight=False, soft_wrap=True)


def say_forecast(path: Path, memory: str | None, as_json: bool) -> None:
    """Print the forecast of a plan; `memory` replaces the plan's limit."""
    with importing():
        from fkernel import report
        from fkernel.study import FisherKernelPlan, check_inputs, forecast, read_plan
    plan = read_plan(path, FisherKernelPlan)
    if memory is not None:
        numerics = type(plan.numerics).model_validate({**plan.numerics.model_dump(), "memory": memory})
        plan = plan.model_copy(update={"numerics": numerics})
    check_inputs(plan)
    with Console(stderr=True).status("counting what the run does, and measuring this machine once"):
        prediction = forecast(plan)
    if as_json:
        typer.echo(json.dumps(report.forecast_record(prediction), indent=1))
        return
    console = wide(100)
    console.print(report.forecast_table(prediction))
    for line in report.forecast_lines(prediction):
        console.print(line, highlight=False, soft_wrap=True)


def query(
    workspace: Workspace,
    one: Annotated[str, typer.Argument(help="Id of a sequence of U, or of a batch given with --batch.")],
    other: Annotated[str, typer.Argument(help="The same; its contribution is printed where it is of U.")],
    batch: Annotated[
        list[Path] | None, typer.Option(help="Saved batches to look ids up in, beside U; NAME/ID is of one of them.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="The plan that ran (OUT/plan.json); needed for sequences outside of U.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the kernel's entry of any two sequences.

    Example: fkernel query study/workspace U-000-01 U-003-00
    """
    with exit_on_error():
        with importing():
            from dataclasses import asdict

            from fkernel.study import FisherKernelPlan, FisherKernelRunner, entry_of, load_workspace, read_plan
        with load_workspace(workspace) as opened:
            if plan is not None and opened.gradients.walked:
                FisherKernelRunner(read_plan(plan, FisherKernelPlan)).adopt(opened)
            entry = entry_of(opened, *(_cache(opened, name, batch or [], plan, workspace) for name in (one, other)))
        if as_json:
            typer.echo(json.dumps(asdict(entry), indent=1))
            return
        console = Console(highlight=False, soft_wrap=True)
        console.print(f"K({entry.row}, {entry.column}) = {entry.kernel:.6g}    cosine {entry.cosine:+.4f}")
        if entry.contribution is not None:
            unit = "nats" if opened.spec["preconditioner"]["calibrated"] else "(bare)"
            console.print(f"{entry.column} moves {entry.row} by {entry.contribution:+.6g} {unit}")


def _cache(workspace: Any, name: str, batches: list[Path], plan: Path | None, place: Path) -> Any:
    """A sequence's gradient: of U it is read, else it is computed with the plan's checkpoint."""
    from fkernel.errors import PlanError
    from fkernel.rollout import load_batch
    from fkernel.study import FisherKernelPlan, FisherKernelRunner, check_saved_batch, read_plan

    folder, _, own = name.rpartition("/")
    loaded = [(path, load_batch(path)) for path in batches if folder in ("", path.resolve().name)]
    matches = [(path, batch) for path, batch in loaded if own in batch.ids]
    of_U = not folder and own in workspace.index
    candidates = [workspace.batch] * of_U + [batch for _, batch in matches]
    contents = {batch.by_id(own).content_hash for batch in candidates}
    if len(contents) > 1:
        raise PlanError(
            f"{own!r} is the id of {len(contents)} different sequences, of U or of the batches that are given; say "
            f"which one: NAME/{own}, where NAME is the batch's folder, or leave its --batch out for U's."
        )
    if of_U:
        return workspace.cache(own)
    if not matches:
        workspace.batch.by_id(name)  # raises, and lists similar ids
    check_saved_batch(*matches[0])
    where = plan or place.parent / "plan.json"
    if not where.is_file():
        raise PlanError(f"{name} is outside of U, so its gradient needs the checkpoint; say --plan OUT/plan.json.")
    runner = FisherKernelRunner(read_plan(where, FisherKernelPlan))
    runner.adopt(workspace)
    return runner.external(matches[0][1].clone_with_subset([own]), name=name)


def influence(
    workspace: Workspace,
    ids: Annotated[list[str] | None, typer.Option("--id", help="Sequences of U to show; * matches any.")] = None,
    advantages: Annotated[
        str | None, typer.Option(help="Another advantage rule: group_mean, grpo, rloo, raw or module.function.")
    ] = None,
    change: Annotated[list[str] | None, typer.Option("--set", help="Another advantage: ID=VALUE.")] = None,
    rows: Annotated[int, typer.Option(help="Sequences to show, largest first.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Print what U's step does to U's own sequences, also under other advantages; no gradient is computed.

    Example: fkernel influence study/workspace --advantages rloo --set U-003-01=0
    """
    with exit_on_error():
        with importing():
            from fkernel import report
            from fkernel.study import influence_of, load_workspace
        with load_workspace(workspace) as opened:
            patterns = tuple(ids) if ids else None
            after = influence_of(opened, patterns, opened.advantages_of(advantages, _changes(change or [])))
            before = influence_of(opened, patterns)
            batch, calibrated = opened.batch, opened.spec["preconditioner"]["calibrated"]
        if as_json:
            typer.echo(json.dumps(after, indent=1))
        else:
            wide(100).print(report.influence_table(batch, before, after, rows, "nats" if calibrated else "bare"))


def _changes(given: list[str]) -> dict[str, float]:
    from fkernel.errors import PlanError

    changes = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            changes[name] = float(value)
        except ValueError:
            raise PlanError(f"--set {text}: expected ID=NUMBER, such as U-003-01=0.5.") from None
    return changes


def show(
    results: Annotated[Path, typer.Argument(help="A directory that `fkernel run` wrote.")],
    request: Annotated[str | None, typer.Option(help="One request only, by name.")] = None,
    rows: Annotated[int, typer.Option(help="Sequences to show of each request.")] = 10,
    netcdf: Annotated[Path | None, typer.Option(help="Write everything to a NetCDF file, too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show finished results.

    Example: fkernel show study --request held_out --rows 20
    """
    with exit_on_error():
        with importing():
            from fkernel.study import FisherKernelResults
        loaded = FisherKernelResults.load(results)
        if netcdf is not None:
            loaded.to_netcdf(netcdf, request)
        if as_json:
            typer.echo(json.dumps(summary(loaded, str(results), request), indent=1))
        else:
            show_results(loaded, rows, request)


def show_results(results: Any, rows: int, request: str | None = None) -> None:
    """Print tables of some requests."""
    from fkernel import report

    console = wide(132)
    for result in [*results.requests.values()] if request is None else [results[request]]:
        console.print(report.effects_table(result, rows))
        if result.calibration:
            console.print(report.calibration_table(result))
        for table in report.request_tables(result, rows):
            console.print(table, highlight=False)
    if request is None:
        say_step(results)


def say_step(results: Any) -> None:
    """Print the facts of the step and of U."""
    from fkernel import report

    for line in report.study_lines(results):
        Console().print(line, highlight=False, soft_wrap=True)
    for table in report.update_tables(results):
        wide(132).print(table, highlight=False, soft_wrap=isinstance(table, str))


def summary(results: Any, out: str, request: str | None = None) -> dict[str, Any]:
    """The main results as JSON."""
    chosen = results.requests if request is None else {request: results[request]}
    return {
        "out": out,
        "units": results.units,
        "step": results.step,
        "requests": {
            name: {
                "sequences": len(result.evaluation),
                "calibration": {key: value._asdict() for key, value in result.calibration.items()},
                "realised_on": result.facts.get("realised_on"),
                "analyses": {key: analysis.facts for key, analysis in result.analyses.items()},
                "evaluation": [
                    {
                        "id": info.id,
                        "predicted": float(result.predicted[row]),
                        "realised": None if result.realised is None else float(result.realised[row]),
                        "top": [[u.id, v] for u, v in result.top_contributors(row)],
                    }
                    for row, info in enumerate(result.evaluation)
                ],
            }
            for name, result in chosen.items()
        },
    }


@plan_app.command()
def init(path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("study.yaml")) -> None:
    """Write a template plan.

    Example: fkernel plan init study.yaml
    """
    with exit_on_error():
        from fkernel.errors import PlanError
        from fkernel.study import TEMPLATE

        if path.exists():
            raise PlanError(f"There is something at {path} already; choose another name.")
        path.write_text(TEMPLATE, encoding="utf-8")
        Console().print(f"Wrote {path}; next: edit it, then fkernel plan check {path}", highlight=False, soft_wrap=True)


@plan_app.command()
def check(
    path: Annotated[Path, typer.Argument(help="A plan, YAML or JSON.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan with every default filled in.")] = False,
) -> None:
    """Check a plan and the files it names, without loading a model.

    Example: fkernel plan check study.yaml
    """
    with exit_on_error():
        with importing():
            from fkernel.study import FisherKernelPlan, check_inputs, read_plan
        plan = read_plan(path, FisherKernelPlan)
        check_inputs(plan)
        if as_json:
            typer.echo(json.dumps(plan.record(), indent=1))
            return
        requests = ", ".join(f"{request.name} ({request.kind})" for request in plan.requests) or "none"
        Console().print(
            f"{path} is a plan (hash {plan.hash[:12]}). Requests: {requests}.", highlight=False, soft_wrap=True
        )


@plan_app.command()
def schema() -> None:
    """Print the JSON schema of plans.

    Example: fkernel plan schema > plan.schema.json
    """
    with exit_on_error():
        with importing():
            from fkernel.study import FisherKernelPlan
        typer.echo(json.dumps(FisherKernelPlan.model_json_schema(), indent=1))
