"""Checks before anything is computed: the files that a plan names, and its output directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fkernel.errors import PlanError
from fkernel.rollout import dotted
from fkernel.study.analyses.observables import OBSERVABLE
from fkernel.study.config.plan import FisherKernelPlan
from fkernel.study.outcome import RequestResult


def check_inputs(plan: FisherKernelPlan) -> None:
    """Check that the files and functions that a plan names exist.

    Raises:
        PlanError: files are missing; one line each, with the key in the plan.
        RolloutError: a function cannot be imported.
    """
    named = {"checkpoint.path": plan.checkpoint.place, "checkpoint.base": plan.checkpoint.base}
    named["checkpoint.model"] = plan.checkpoint.model
    named["checkpoint.names"] = names if isinstance(names := plan.checkpoint.names, str) else None
    if plan.step.after is not None:
        named["step.after.path"] = plan.step.after.place
    if plan.step.loss is not None:
        named |= {f"step.loss.{place}.path": one.place for place, one in plan.step.loss.checkpoints.items()}
    for i, prompts in enumerate(plan.prompts):
        named[f"prompts.{i}.jsonl"], named[f"prompts.{i}.dataset"] = prompts.jsonl, prompts.dataset
    every = {"analyses": plan.analyses, **{f"requests.{i}.analyses": r.analyses for i, r in enumerate(plan.requests)}}
    for place, analyses in every.items():
        for observable in () if analyses is None else analyses.observables:
            if observable.reference is not None:
                named[f"{place}.observables.{observable.name}.reference.path"] = observable.reference.place
            if observable.function is not None:
                dotted(observable.function, OBSERVABLE)
    named["update.path"] = getattr(plan.update, "path", None)
    named |= {f"requests.{i}.path": getattr(request, "path", None) for i, request in enumerate(plan.requests)}
    missing = [
        f"{place}: there is nothing at {path}; expected a file or a directory."
        for place, path in named.items()
        if path is not None and not str(path).startswith("hub:") and not Path(path).exists()
    ]
    if missing:
        raise PlanError("\n".join(missing))


def missed_pairs(plan: FisherKernelPlan, requests: Mapping[str, RequestResult]) -> list[str]:
    """Warnings for the plan's pairs whose row is in no request."""
    rows = {entry.row for result in requests.values() for entry in result.selected}
    missed = sorted({row for row, _ in plan.capture.pairs} - rows)
    return [f"capture.pairs: no request has a sequence {row!r}; nothing was kept for it" for row in missed]


def check_out(plan: FisherKernelPlan, overwrite: bool = False) -> None:
    """Check that `out` does not hold another plan's results.

    Raises:
        PlanError: the plan's `out` is a file, or holds results of another plan.
    """
    out = Path(plan.out)
    if out.exists() and not out.is_dir():
        raise PlanError(f"{out} is a file; results need a directory (out:).")
    recorded = out / "environment.json"
    if overwrite or not recorded.is_file():
        return
    try:
        before = json.loads(recorded.read_text(encoding="utf-8")).get("plan_hash")
    except ValueError:
        before = None
    if before != plan.hash:
        raise PlanError(
            f"{out} holds results of another plan (hash {str(before)[:12]}, this one's is {plan.hash[:12]}); choose "
            f"another directory (out:), or say --overwrite."
        )
