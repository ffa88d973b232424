"""Tables of finished results: `fkernel show`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fkernel.cli.console import AsJson, exit_on_error, importing, print_line, wide


def show(
    results: Annotated[Path, typer.Argument(help="A directory that `fkernel run`, `demo` or `account` wrote.")],
    request: Annotated[str | None, typer.Option(help="One request of a study only, by name.")] = None,
    rows: Annotated[int, typer.Option(help="Sequences to show of each request, or probe of an account.")] = 10,
    netcdf: Annotated[Path | None, typer.Option(help="Write everything of a study to a NetCDF file, too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show finished results.

    Example: fkernel show study --request held_out --rows 20

    Example: fkernel show account --rows 5
    """
    with exit_on_error():
        with importing():
            from fkernel.errors import ResultsError
            from fkernel.report import load_results
            from fkernel.study import AccountResults
        loaded = load_results(results)
        if isinstance(loaded, AccountResults):
            if request is not None or netcdf is not None:
                raise ResultsError(
                    f"{results} is the account of a run, which has no requests and no NetCDF file; leave "
                    f"{'--request' if request is not None else '--netcdf'} out, or take AccountResults.to_xarray()."
                )
            if as_json:
                typer.echo(json.dumps(loaded.summary(), indent=1))
            else:
                show_account(loaded, rows)
            return
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


def show_account(results: Any, rows: int) -> None:
    """Print an account's tables."""
    import numpy as np

    from fkernel import report

    console = wide(132)
    console.print(report.account_table(results, rows))
    for e in np.argsort(-np.abs(results["realised"]), kind="stable")[:rows].tolist():
        console.print()
        console.print(report.culprits_table(results, e, rows))
        console.print(report.prompts_table(results, e, rows))
        if "rewards" in results.arrays:
            console.print(report.rewards_table(results, e))
        if "parts" in results.arrays:
            console.print(report.parts_table(results, e))
        if "older" in results.arrays:
            console.print(report.ages_table(results, e))


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
