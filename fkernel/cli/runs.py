"""Commands of recorded runs: `fkernel account | replay | recording show`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fkernel.cli.console import (
    AsJson,
    can_draw,
    exit_on_error,
    importing,
    path_option,
    print_line,
    progress_and_log,
    wide,
)
from fkernel.cli.page import Page
from fkernel.cli.ranks import Processes, joined, of_all_ranks, started
from fkernel.cli.showing import show_account

RecordingPath = Annotated[Path, typer.Argument(help="A recording: the directory that a Recorder wrote.")]
Probes = Annotated[Path, typer.Option(help="Probes: JSON lines of prompt and response, or a saved batch.")]
Base = Annotated[Path | None, typer.Option(help="The base model of an adapter, if it is no longer where it was.")]

FEW = 5
"""Probes in the ledger that is printed."""

recording_app = typer.Typer(help="Look at recordings of runs.", no_args_is_help=True)


def account(
    recording: RecordingPath,
    probes: Probes,
    out: Annotated[Path, path_option("Directory for the account.")],
    steps: Annotated[str | None, typer.Option(help="Steps A:B, from A to before B; all of them by default.")] = None,
    path: Annotated[str, typer.Option(help="Where gradients are evaluated: midpoint, or gauss2.")] = "midpoint",
    observe: Annotated[
        str, typer.Option(help="logprob, entropy, kl, expected_reward, or module.function.")
    ] = "logprob",
    memory: Annotated[str | None, typer.Option(help="For gradients and adjoints, such as 8GiB.")] = None,
    disk: Annotated[str | None, typer.Option(help="For states between snapshots, such as 100GiB.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, or float64.")] = "float32",
    ages: Annotated[bool, typer.Option("--ages", help="Split momentum by the age of gradients.")] = False,
    device: Annotated[str, typer.Option(help="A torch device.")] = "cpu",
    base: Base = None,
    rows: Annotated[int, typer.Option(help="Print tables, too, of so many probes, and so many sequences of each.")] = 0,
    pictures: Annotated[bool, typer.Option(help="Draw pictures to OUT/pictures.")] = True,
    page: Page = True,
    processes: Processes = None,
    as_json: AsJson = False,
) -> None:
    """Account for a recorded run: what every sequence of every step did to each probe, to the end of the run.

    Example: fkernel account run/recording --probes probes.jsonl --out account

    After an interruption the same command begins at the last step that was written to disk. Under torchrun it joins the
    ranks that are there.
    """
    with exit_on_error():
        if started(processes):
            return
        with importing():
            from fkernel import report
            from fkernel.study import account_recording
        options: dict[str, Any] = {
            "observable": observe,
            "memory": memory,
            "disk": disk,
            "dtype": dtype,
            "ages": ages,
            "device": device,
            "base": base,
        }
        mesh = joined(device)
        with of_all_ranks(mesh, "fkernel account") as first:
            options |= {"steps": _range(steps), "path": path, "mesh": mesh}
            if not first:
                account_recording(recording, probes, out, **options)
                return
            with progress_and_log("minimal") as on_progress:
                results = account_recording(recording, probes, out, on_progress=on_progress, **options)
        if page:
            report.write_page(results, out)
        if pictures and can_draw():
            report.draw_account(results, out / "pictures")
        if as_json:
            typer.echo(json.dumps(results.summary(), indent=1))
            return
        if rows:
            show_account(results, rows)
        finish(results, recording, probes, out, page)


def finish(results: Any, recording: Path, probes: Path, out: Path, page: bool) -> None:
    """Print what an account found, where it is, and what may come next."""
    from shlex import join

    from fkernel import report

    console = wide(100)
    console.print(report.account_table(results, FEW))
    for line in report.account_findings(results):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for line in report.account_lines(results):
        print_line(line)
    print_line(f"Wrote {out}" + (f"; the page is {out / 'report.html'}" if page else "") + ". Next:")
    print_line(f"  {join(['fkernel', 'show', str(out)])}")
    most = report.most_of_it(results)
    if most:
        dropped = [word for each in most for word in ("--drop", each)]
        command = ["fkernel", "replay", str(recording), "--probes", str(probes), *dropped]
        print_line(f"  {join(command)}")


def replay(
    recording: RecordingPath,
    probes: Probes,
    drop: Annotated[
        list[str] | None,
        typer.Option(help="Sequences left out of the loss: an id (0012/U-003-*), 'prompt:TEXT' or 'response:TEXT'."),
    ] = None,
    weigh: Annotated[list[str] | None, typer.Option(help="Sequences weighed otherwise: PATTERN=WEIGHT.")] = None,
    part: Annotated[
        list[str] | None, typer.Option(help="Parts of the loss weighed otherwise: kl=0, entropy=2, loss=1.")
    ] = None,
    upto: Annotated[int | None, typer.Option(help="The step before which the replay ends.")] = None,
    max_norm: Annotated[float | None, typer.Option(help="That a changed gradient is clipped to.")] = None,
    device: Annotated[str, typer.Option(help="A torch device.")] = "cpu",
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """Take the recorded steps again, without some sequences, and print what the run would have done to the probes.

    Example: fkernel replay run/recording --probes probes.jsonl --drop "prompt:19+28="

    Without --drop, --weigh and --part it replays the run as it was, and says how far it ends from the run.
    """
    with exit_on_error():
        with importing():
            from fkernel import report
            from fkernel.study import replay_probes
        weights = dict.fromkeys(drop or [], 0.0) | dict(_weight("--weigh", each) for each in weigh or [])
        parts = dict(_weight("--part", each) for each in part or [])
        with progress_and_log("minimal") as on_progress:
            options: dict[str, Any] = {"upto": upto, "max_norm": max_norm, "device": device, "base": base}
            results = replay_probes(recording, probes, weights, parts=parts or None, on_progress=on_progress, **options)
        if as_json:
            typer.echo(json.dumps(report.replay_record(results), indent=1))
            return
        wide(100).print(report.replay_table(results))
        for line in report.replay_lines(results):
            print_line(line)


@recording_app.command("show")
def show_recording(recording: RecordingPath, as_json: AsJson = False) -> None:
    """Show the steps of a recording: sizes, losses, learning rates, norms, and what is missing.

    Example: fkernel recording show run/recording
    """
    with exit_on_error():
        with importing():
            from fkernel import report
            from fkernel.record import Recording
        summary = Recording.open(recording).summary()
        if as_json:
            typer.echo(json.dumps(summary, indent=1))
            return
        wide(100).print(report.recording_table(summary))
        for line in report.recording_lines(summary):
            print_line(line)


def _range(given: str | None) -> range | None:
    from fkernel.errors import PlanError

    if given is None:
        return None
    first, colon, stop = given.partition(":")
    try:
        return range(int(first), int(stop) if colon else int(first) + 1)
    except ValueError:
        raise PlanError(f"--steps {given}: expected A:B, such as 0:100, or one step.") from None


def _weight(option: str, given: str) -> tuple[str, float]:
    from fkernel.errors import PlanError

    pattern, _, value = given.rpartition("=")
    try:
        return pattern, float(value)
    except ValueError:
        raise PlanError(f"{option} {given}: expected NAME=NUMBER, such as 'prompt:19+28==0.5' or kl=0.") from None
