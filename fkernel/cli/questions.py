"""Commands that ask more of a finished study's workspace: `fkernel ask | query | influence`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fkernel.cli.console import AsJson, exit_on_error, importing, print_line, progress_and_log, wide
from fkernel.cli.pairs import Probe
from fkernel.cli.showing import record_of, show_request

Workspace = Annotated[Path, typer.Argument(help="A workspace that `fkernel run` made: OUT/workspace.")]

PlanFile = Annotated[Path | None, typer.Option(help="The plan that ran (default: plan.json beside the workspace).")]


def ask(
    workspace: Workspace,
    probe: Probe = None,
    raw: Annotated[bool, typer.Option("--raw", help="Prompts are whole texts, and not put into the template.")] = False,
    unended: Annotated[bool, typer.Option("--unended", help="Responses do not end with the EOS token.")] = False,
    plan: PlanFile = None,
    rows: Annotated[int, typer.Option(help="Print tables, too, of so many probes.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Explain what a finished study's step did to one more probe; nothing of U is computed again.

    Example: fkernel ask study/workspace --probe "40+41=" "88"
    """
    with exit_on_error():
        with importing():
            from fkernel import report
            from fkernel.study import ask as ask_study
        keys = {"raw": raw, "ended": not unended}
        probes = [{"prompt": prompt, "response": response, **keys} for prompt, response in probe or []]
        with progress_and_log("minimal") as on_progress:
            result = ask_study(workspace, probes, plan, on_progress)
        if as_json:
            typer.echo(json.dumps(record_of(result), indent=1))
            return
        if rows:
            show_request(result, rows)
        console = wide(100)
        for line in report.probe_lines(result, "bare" if result.momentum is None else "nats"):
            console.print(line, highlight=False, soft_wrap=not console.is_terminal)


def query(
    workspace: Workspace,
    one: Annotated[str, typer.Argument(help="Id of a sequence of U, or of a batch given with --batch.")],
    other: Annotated[str, typer.Argument(help="The same; its contribution is printed where it is of U.")],
    batch: Annotated[
        list[Path] | None, typer.Option(help="Saved batches to look ids up in, beside U; NAME/ID is of one of them.")
    ] = None,
    probe: Probe = None,
    plan: PlanFile = None,
    as_json: AsJson = False,
) -> None:
    """Print the kernel's entry of any two sequences.

    Example: fkernel query study/workspace U-000-01 U-003-00

    Example: fkernel query study/workspace probe-1 U-003-00 --probe "40+41=" "88"
    """
    with exit_on_error():
        with importing():
            from dataclasses import asdict

            from fkernel.study import FisherKernelPlan, FisherKernelRunner, entry_of, load_workspace, read_plan
        with load_workspace(workspace) as opened:
            if plan is not None and opened.gradients.walked:
                FisherKernelRunner(read_plan(plan, FisherKernelPlan)).adopt(opened)
            given = [(each[0], each[1]) for each in probe or []]
            caches = (_cache(opened, name, batch or [], given, plan, workspace) for name in (one, other))
            entry = entry_of(opened, *caches)
        if as_json:
            typer.echo(json.dumps(asdict(entry), indent=1))
            return
        print_line(f"K({entry.row}, {entry.column}) = {entry.kernel:.6g}    cosine {entry.cosine:+.4f}")
        if entry.contribution is not None:
            unit = "nats" if opened.spec["preconditioner"]["calibrated"] else "(bare)"
            print_line(f"{entry.column} moves {entry.row} by {entry.contribution:+.6g} {unit}")


def _cache(
    workspace: Any, name: str, batches: list[Path], probes: list[tuple[str, str]], plan: Path | None, place: Path
) -> Any:
    """A sequence's gradient: of U it is read, else it is computed with the plan's checkpoint."""
    from fkernel.errors import PlanError
    from fkernel.rollout import load_batch
    from fkernel.study import check_saved_batch, probes_batch, runner_of

    if probes and name.startswith("probe-"):
        runner = runner_of(workspace, place, plan)
        return runner.external(probes_batch(probes, runner).clone_with_subset([name]))
    folder, _, sequence_id = name.rpartition("/")
    loaded = [(path, load_batch(path)) for path in batches if folder in ("", path.resolve().name)]
    matches = [(path, batch) for path, batch in loaded if sequence_id in batch.ids]
    of_U = not folder and sequence_id in workspace.index
    candidates = [workspace.batch] * of_U + [batch for _, batch in matches]
    contents = {batch.by_id(sequence_id).content_hash for batch in candidates}
    if len(contents) > 1:
        raise PlanError(
            f"{sequence_id!r} is the id of {len(contents)} different sequences, of U or of the batches that are given; "
            f"say which one: NAME/{sequence_id}, where NAME is the batch's folder, or leave its --batch out for U's."
        )
    if of_U:
        return workspace.cache(sequence_id)
    if not matches:
        workspace.batch.by_id(name)  # raises, and lists similar ids
    check_saved_batch(*matches[0])
    return runner_of(workspace, place, plan).external(matches[0][1].clone_with_subset([sequence_id]), name=name)


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
