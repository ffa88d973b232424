"""Commands of studies: `fkernel run | show | plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fkernel.cli.console import Terminal, exit_on_error, importing, path_option, print_line, wide
from fkernel.cli.page import Page
from fkernel.cli.ranks import Processes, joined, started
from fkernel.cli.writing import execute

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

plan_app = typer.Typer(help="Write, check and describe plans.", no_args_is_help=True)


def run(
    plan: Annotated[Path, typer.Argument(help="A plan, YAML or JSON; `fkernel plan init` writes one.")],
    out: Annotated[Path | None, path_option("Directory for the results, instead of the plan's.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace results that another plan left there.")] = False,
    rows: Annotated[int, typer.Option(help="Print tables, too, with so many sequences of each request.")] = 0,
    log: Annotated[str, typer.Option(help="Log level: minimal, normal, detailed or debug.")] = "minimal",
    page: Page = True,
    processes: Processes = None,
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
        results = execute(loaded, overwrite, log, page, joined(loaded.numerics.device))
        if results is not None:
            finish(results, Path(loaded.out), rows, as_json)


def finish(results: Any, out: Path, rows: int, as_json: bool) -> None:
    """Print what a finished run found."""
    from fkernel import report

    if as_json:
        typer.echo(json.dumps(summary(results, str(out)), indent=1))
        return
    if rows:
        show_results(results, rows)
    console, page, workspace = wide(100), out / "report.html", results.plan["storage"]["workspace"] or out / "workspace"
    for line in (*report.request_lines(results), *report.findings(results)):
        console.print(line, highlight=False)
    print_line(f"Wrote {out}" + (f"; the page is {page}" if page.exists() else "") + ". Next:")
    following = [f"fkernel show {out}"]
    if results.plan["storage"]["persist"]:
        following.append(f'fkernel ask {workspace} --probe "PROMPT" "RESPONSE"')
    for command in following:
        print_line(f"  {command}")


def say_forecast(path: Path, memory: str | None, as_json: bool) -> None:
    """Print the forecast of a plan; `memory` replaces the plan's limit."""
    with importing():
        from fkernel import report
        from fkernel.study import FisherKernelPlan, as_recorded, check_inputs, forecast, read_plan
    plan = as_recorded(read_plan(path, FisherKernelPlan))
    if memory is not None:
        numerics = type(plan.numerics).model_validate({**plan.numerics.model_dump(), "memory": memory})
        plan = plan.model_copy(update={"numerics": numerics})
    check_inputs(plan)
    with Terminal(stderr=True).status("counting what the run does, and measuring this machine once"):
        prediction = forecast(plan)
    if as_json:
        typer.echo(json.dumps(report.forecast_record(prediction), indent=1))
        return
    console = wide(100)
    console.print(report.forecast_table(prediction))
    for line in report.forecast_lines(prediction):
        print_line(line)


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
    for result in [*results.requests.values()] if request is None else [results[request]]:
        show_request(result, rows)
    if request is None:
        say_step(results)


def show_request(result: Any, rows: int) -> None:
    """Print the tables of one request."""
    from fkernel import report

    console = wide(132)
    console.print(report.effects_table(result, rows))
    if result.calibration:
        console.print(report.calibration_table(result))
    for table in report.request_tables(result, rows):
        console.print(table, highlight=False)


def say_step(results: Any) -> None:
    """Print the facts of the step and of U."""
    from fkernel import report

    for line in report.study_lines(results):
        print_line(line)
    for table in report.update_tables(results):
        wide(132).print(table, highlight=False, soft_wrap=isinstance(table, str))


def record_of(result: Any) -> dict[str, Any]:
    """The main results of a request as JSON."""
    return {
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


def summary(results: Any, out: str, request: str | None = None) -> dict[str, Any]:
    """The main results as JSON."""
    chosen = results.requests if request is None else {request: results[request]}
    return {
        "out": out,
        "units": results.units,
        "step": results.step,
        "requests": {name: record_of(result) for name, result in chosen.items()},
    }


@plan_app.command()
def init(path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("study.yaml")) -> None:
    """Write a template plan.

    Example: fkernel plan init study.yaml
    """
    with exit_on_error():
        from fkernel.errors import PlanError
        from fkernel.io import atomic_write
        from fkernel.study import TEMPLATE

        if path.exists():
            raise PlanError(f"There is something at {path} already; choose another name.")
        atomic_write(path, [TEMPLATE.encode()])
        print_line(f"Wrote {path}; next: edit it, then fkernel plan check {path}")


@plan_app.command()
def check(
    path: Annotated[Path, typer.Argument(help="A plan, YAML or JSON.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan with every default filled in.")] = False,
) -> None:
    """Check a plan and everything that it names, without loading a model.

    Example: fkernel plan check study.yaml
    """
    with exit_on_error():
        with importing():
            from fkernel.study import FisherKernelPlan, as_recorded, check_inputs, check_out, read_plan
        plan = read_plan(path, FisherKernelPlan)
        check_inputs(plan)
        plan = as_recorded(plan)  # a recorded or dumped batch is there, and all that a dump lacks is said
        check_out(plan)
        if as_json:
            typer.echo(json.dumps(plan.record(), indent=1))
            return
        requests = ", ".join(f"{request.name} ({request.kind})" for request in plan.requests) or "none"
        print_line(f"{path} is a plan (hash {plan.hash[:12]}). Requests: {requests}.")


@plan_app.command()
def schema() -> None:
    """Print the JSON schema of plans.

    Example: fkernel plan schema > plan.schema.json
    """
    with exit_on_error():
        with importing():
            from fkernel.study import FisherKernelPlan
        typer.echo(json.dumps(FisherKernelPlan.model_json_schema(), indent=1))
