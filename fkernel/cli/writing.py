"""Run a plan and write what it found: results, log, batches, pictures; of several ranks, rank 0 alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fkernel.cli.console import progress_and_log
from fkernel.cli.ranks import of_all_ranks


def execute(plan: Any, overwrite: bool, log: str, mesh: Any = None) -> Any:
    """Run a plan; write its results, log, batches and pictures. Of several ranks, rank 0 alone writes and returns."""
    from fkernel.study import FisherKernelRunner, check_out, recorded

    if mesh is None:
        check_out(plan, overwrite)
        with recorded(Path(plan.out) / "log.jsonl"), progress_and_log(log) as on_progress:
            runner = FisherKernelRunner(plan, on_progress=on_progress)
            return _saved(plan, runner, runner.run())
    with of_all_ranks(mesh, "fkernel run") as first:
        if not first:
            FisherKernelRunner(plan, mesh=mesh).run()
            return None
        check_out(plan, overwrite)
        with recorded(Path(plan.out) / "log.jsonl"), progress_and_log(log) as on_progress:
            runner = FisherKernelRunner(plan, on_progress=on_progress, mesh=mesh)
            return _saved(plan, runner, runner.run())


def _saved(plan: Any, runner: Any, results: Any) -> Any:
    """Write results, batches and pictures."""
    from fkernel import report

    out = Path(plan.out)
    if plan.storage.batches:
        runner.save_batches(out)
    _remove_pictures(out)
    results.save_results(out)
    if plan.storage.pictures:
        report.draw_all(results, out / "pictures")
        for name, result in results.requests.items():
            if "tokens" in result.analyses and result.analyses["tokens"].skipped is None:
                page = out / "pictures" / f"{name}_tokens.html"
                page.write_text(report.token_html(result), encoding="utf-8")
    return results


def _remove_pictures(out: Path) -> None:
    """Remove the pictures of the results that will be replaced, and no other files."""
    try:
        names = [*json.loads((out / "results.json").read_text(encoding="utf-8"))["requests"], "update"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    for picture in (out / "pictures").glob("*"):
        known = picture.name == "spectrum.png" or any(picture.name.startswith(f"{name}_") for name in names)
        if known and picture.suffix in (".png", ".html"):
            picture.unlink()
