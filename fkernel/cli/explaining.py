"""Commands about probes written by hand: `fkernel explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fkernel.cli import study
from fkernel.cli.console import AsJson, exit_on_error, importing, path_option, print_line
from fkernel.cli.pairs import Probe
from fkernel.cli.ranks import Processes, joined, of_all_ranks, started
from fkernel.cli.writing import execute


def explain(
    checkpoint: Annotated[str, typer.Argument(help="The checkpoint before the step, with its optimizer's state.")],
    batch: Annotated[
        str,
        typer.Option(help="The step's batch: a recording, what a trainer dumped, or a saved batch; PATH or PATH:STEP."),
    ],
    probe: Probe = None,
    out: Annotated[Path, path_option("Directory for the results.")] = Path("explained"),
    max_norm: Annotated[
        str | None, typer.Option(help="To which the training clipped its gradient; none where it did not.")
    ] = None,
    after: Annotated[str | None, typer.Option(help="The checkpoint after the step, to measure changes on.")] = None,
    template: Annotated[
        str | None, typer.Option(help="Into which prompts are put: chat, gsm8k_r1; else they are the whole text.")
    ] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="Another key of the plan: update.weights=dapo.")
    ] = None,
    unended: Annotated[bool, typer.Option("--unended", help="Responses do not end with the EOS token.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace results that another plan left there.")] = False,
    log: Annotated[str, typer.Option(help="Log level: minimal, normal, detailed or debug.")] = "minimal",
    rows: Annotated[int, typer.Option(help="Print tables, too, of so many probes.")] = 0,
    processes: Processes = None,
    as_json: AsJson = False,
) -> None:
    """Explain what one step did to sequences written by hand: nothing is sampled, and no plan is needed.

    Example: fkernel explain run/checkpoint-4 --batch run/completions:5 --max-norm 1.0 --probe "40+41=" "88"

    Example: fkernel explain run/recording --batch run/recording:4 --probe "40+41=" "88" --probe "40+41=" "81"
    """
    with exit_on_error():
        with importing():
            from fkernel.io import atomic_write
            from fkernel.study import check_out, explanation
        more = {"ended": False} if unended else {}
        probes = [{"prompt": prompt, "response": response, **more} for prompt, response in probe or []]
        named = {"step.max_norm": _number(max_norm), "step.after": after and {"path": after}, "template": template}
        settings = {key: value for key, value in named.items() if value is not None} | _settings(change or [])
        if max_norm is not None:
            settings["step.max_norm"] = _number(max_norm)
        made = explanation(checkpoint, batch, probes, out, settings)
        if started(processes or made.plan.numerics.processes):
            return
        mesh = joined(made.plan.numerics.device)
        with of_all_ranks(mesh, "fkernel explain") as first:
            if first:
                check_out(made.plan, overwrite)
            for line in made.defaults if first else ():
                print_line(f"default: {line}", style="dim", stderr=True)
            results = execute(made.plan, overwrite, log, mesh=mesh)
        if first:
            atomic_write(out / "plan.yaml", [made.yaml().encode()])
            study.finish(results, out, rows, as_json)


def _number(given: str | None) -> float | None:
    from fkernel.errors import PlanError

    if given is None or given.lower() == "none":
        return None
    try:
        return float(given)
    except ValueError:
        raise PlanError(f"--max-norm {given}: expected a number, or none.") from None


def _settings(given: list[str]) -> dict[str, Any]:
    import yaml

    from fkernel.errors import PlanError
    from fkernel.study import parse_yaml

    settings = {}
    for text in given:
        key, equals, value = text.partition("=")
        try:
            settings[key] = parse_yaml(value)
        except (ValueError, yaml.YAMLError):
            equals = ""
        if not equals or not key:
            raise PlanError(f"--set {text}: expected KEY=VALUE, such as update.weights=dapo.")
    return settings
