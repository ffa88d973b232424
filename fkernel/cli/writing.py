"""Run a plan and write what it found: results, log, batches, page, pictures; of several ranks, rank 0 alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fkernel.cli.console import can_draw, print_line, progress_and_log
from fkernel.cli.ranks import of_all_ranks


def execute(plan: Any, overwrite: bool, log: str, page: bool = True, mesh: Any = None) -> Any:
    """Run a plan; write its results, log, batches, page and pictures.

    Of several ranks, rank 0 alone writes, prints and returns results; the others return None.
    """
    from fkernel.study import FisherKernelRunner, claimed, recorded

    with of_all_ranks(mesh, "fkernel run") as first:
        if not first:
            FisherKernelRunner(plan, mesh=mesh).run()
            return None
        with claimed(plan, overwrite) as out, recorded(out / "log.jsonl"), progress_and_log(log) as on_progress:
            runner = FisherKernelRunner(plan, on_progress=on_progress, mesh=mesh)
            if mesh is None:  # of several ranks nothing is forecast
                say_estimate(runner)
            return _saved(plan, runner, runner.run(), page)


def say_estimate(runner: Any) -> None:
    """Print in a line what a run will take, after what can be found wrong without it."""
    from fkernel import report
    from fkernel.errors import FKernelError, PlanError
    from fkernel.study import check_inputs, forecast

    check_inputs(runner.plan)
    try:
        line = report.forecast_lines(forecast(runner.plan, runner.checkpoint))[0]
    except PlanError as error:  # batches of callbacks have no length yet
        line = f"unknown: {error}"
    except FKernelError:  # the run says what is wrong
        return
    print_line(f"Estimate: {line}", stderr=True)


def _saved(plan: Any, runner: Any, results: Any, page: bool) -> Any:
    """Write results, batches, page and pictures."""
    from fkernel import report
    from fkernel.io import atomic_write

    out = Path(plan.out)
    if plan.storage.batches:
        runner.save_batches(out)
    _remove_pictures(out)
    results.save_results(out)
    if page:
        report.write_page(results, out)
    if plan.storage.pictures and can_draw():
        report.draw_all(results, out / "pictures")
        for name, result in results.requests.items():
            if "tokens" in result.analyses and result.analyses["tokens"].skipped is None:
                tokens = out / "pictures" / f"{name}_tokens.html"
                atomic_write(tokens, [report.token_html(result).encode()])
    return results


def _remove_pictures(out: Path) -> None:
    """Remove the page and the pictures of the results that will be replaced, and no other files."""
    from fkernel.io import parse_json, remove_file

    try:
        names = [*parse_json((out / "results.json").read_text(encoding="utf-8"))["requests"], "update"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    remove_file(out / "report.html")
    for picture in (out / "pictures").glob("*"):
        known = picture.name == "spectrum.png" or any(picture.name.startswith(f"{name}_") for name in names)
        if known and picture.suffix in (".png", ".html"):
            remove_file(picture)
