"""Certificates of a study: what the engine checked on its model, and what the training did that is not modelled."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from math import isfinite
from typing import Any

from fkernel import func
from fkernel.checkpoint import Checkpoint
from fkernel.engine import state_against_step
from fkernel.precond import AdamWStep
from fkernel.study.config.plan import FisherKernelPlan
from fkernel.study.log import say
from fkernel.study.rows import Policy


def skipping(plan: FisherKernelPlan) -> AbstractContextManager[None]:
    """Leave out the certificates that a plan skips by name."""
    names = plan.numerics.skip_certificates
    return func.skip_certificates(*names) if names else nullcontext()


def along(policy: Policy, E: func.Sequences, step: AdamWStep) -> Policy:
    """Certify along the step that E's changes follow the derivative; else give the policy that looks through detach."""
    f = func.true_derivative(policy.f, policy.params, E, step.total)
    if f is policy.f:
        return policy
    return policy._replace(f=f, apply=func.through_detach(policy.apply), through_detach=True)


def findings(
    made: Iterable[func.Certificate],
    policy: Policy,
    step: AdamWStep | None,
    checkpoint: Checkpoint,
    logger: logging.Logger,
) -> dict[str, Any]:
    """List certificates and conditions as JSON; the state's certificate is made here, and a failed one is told.

    Args:
        made: certificates of the run.
        policy: the checkpoint as the engine takes it.
        step: Δθ; None where nothing is predicted.
        checkpoint: with what its training did that is not modelled.
        logger: where failures are told.
    """
    every = [*made]
    if step is not None:
        every.append(state_against_step(step.total, policy.params, policy.after))
    listed = worst_of(every)
    for one in listed:
        if one["passed"] is False:
            say(logger, f"certificate {one['name']} failed: {one['detail']}", logging.WARNING)
    return {"certificates": listed, "conditions": [asdict(condition) for condition in checkpoint.conditions]}


def worst_of(made: Iterable[func.Certificate]) -> list[dict[str, Any]]:
    """List certificates as JSON, of each kind the one that was furthest off; a number that is none is null."""
    worst: dict[tuple[str, float], func.Certificate] = {}
    for one in made:
        key = one.name, one.bound if one.name in ("company", "forward") else 0.0
        if key not in worst or (worst[key].passed is not False and not one.error <= worst[key].error):
            worst[key] = one
    return [one._asdict() | {"error": one.error if isfinite(one.error) else None} for one in worst.values()]
