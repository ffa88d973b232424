"""Commands of studies: `fkernel run | plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fkernel.cli.console import AsJson, Terminal, exit_on_error, importing, path_option, print_line, wide
from fkernel.cli.page import Page
from fkernel.cli.ranks import Processes, joined, started
from fkernel.cli.showing import show_results, summary
from fkernel.cli.writing import execute

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
        console.print(line, highlight=False, soft_wrap=not console.is_terminal)  # in a file a line is a line
    print_line(f"Wrote {out}" + (f"; the page is {page}" if page.exists() else "") + ". Next:")
    following = [f"fkernel show {out}"]
    if Path(workspace).is_dir():  # several ranks write none
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
