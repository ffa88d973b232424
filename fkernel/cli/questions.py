"""Commands that ask more of a finished study's workspace: `fkernel query | influence`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fkernel.cli.console import exit_on_error, importing, wide
from fkernel.cli.study import AsJson

Workspace = Annotated[Path, typer.Argument(help="A workspace that `fkernel run` made: OUT/workspace.")]


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
