"""One more probe of a finished study: U's gradients and the step are read, and only the probe's are computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fkernel.errors import PlanError
from fkernel.rollout import GeneratedBatch
from fkernel.study.config.io import read_plan
from fkernel.study.config.plan import FisherKernelPlan
from fkernel.study.config.requests import PayloadBatch
from fkernel.study.outcome import RequestResult
from fkernel.study.runner import FisherKernelRunner
from fkernel.study.workspace import KernelWorkspace, load_workspace

Probe = tuple[str, str] | Mapping[str, Any]


def ask(
    workspace: str | Path,
    probes: Sequence[Probe],
    plan: str | Path | None = None,
    on_progress: Callable[[str, int, int], Any] = lambda what, n, total: None,
) -> RequestResult:
    """Explain what a finished study's step did to sequences written by hand.

    Args:
        workspace: directory of a study's workspace, OUT/workspace.
        probes: (prompt, response) each, or the keys of a payload's sample: prompt, response, name, raw, ended, reward.
            A prompt is put into the plan's template, unless raw.
        plan: the plan that ran; by default OUT/plan.json, beside the workspace.
        on_progress: called with (what is being done, parts done since the last call, parts in all).

    Returns:
        As the study's own requests, with the plan's capture and analyses.

    Raises:
        PlanError: there is no plan, or it is of another checkpoint.
        FKernelError: a probe cannot be scored, or there is no workspace.
    """
    with load_workspace(workspace) as opened:
        runner = runner_of(opened, workspace, plan, on_progress)
        request = probes_request(probes)
        result = runner.evaluate_batch(request)
    return result


def runner_of(
    opened: KernelWorkspace,
    place: str | Path,
    plan: str | Path | None = None,
    on_progress: Callable[[str, int, int], Any] = lambda what, n, total: None,
) -> FisherKernelRunner:
    """The runner of an opened workspace's study.

    Args:
        opened: the workspace.
        place: its directory.
        plan: the plan that ran; by default plan.json beside it.
        on_progress: as of `ask`.

    Raises:
        PlanError: there is no plan, or it is of another checkpoint.
    """
    file = Path(place).parent / "plan.json" if plan is None else Path(plan)
    if not file.is_file():
        raise PlanError(f"There is no plan at {file}; name the one that ran (--plan OUT/plan.json).")
    runner = FisherKernelRunner(read_plan(file, FisherKernelPlan), on_progress=on_progress)
    runner.adopt(opened)
    return runner


def probes_request(probes: Sequence[Probe]) -> PayloadBatch:
    """A request about sequences written by hand.

    Args:
        probes: as of `ask`.

    Raises:
        PlanError: there is none.
    """
    if not probes:
        raise PlanError('There is no probe; give at least one prompt and response (--probe "PROMPT" "RESPONSE").')
    samples = [each if isinstance(each, Mapping) else {"prompt": each[0], "response": each[1]} for each in probes]
    return PayloadBatch.model_validate({"kind": "payload", "name": "probes", "samples": samples})


def probes_batch(probes: Sequence[Probe], runner: FisherKernelRunner) -> GeneratedBatch:
    """Score sequences written by hand, without explaining them; arguments as of `ask` and `runner_of`."""
    return probes_request(probes).generate(runner.generator)
