"""Certificates of a run, and conditions of its training that are not modelled."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from math import isfinite
from typing import Any

from fkernel import func
from fkernel.checkpoint import Checkpoint
from fkernel.engine import own_part, state_against_step, values_of_step
from fkernel.shapes import Tree
from fkernel.study.config.plan import FisherKernelPlan
from fkernel.study.log import say
from fkernel.study.rows import Policy


def skipping(plan: FisherKernelPlan) -> AbstractContextManager[None]:
    """Skip the certificates that the plan names."""
    names = plan.numerics.skip_certificates
    return func.skip_certificates(*names) if names else nullcontext()


def along(policy: Policy, E: func.Sequences, step: Tree) -> Policy:
    """Certify E's derivative along the step; where it fails, return a policy that differentiates through detach."""
    f = func.true_derivative(policy.f, policy.params, E, step, values_of_step(policy.params, E, step))
    if f is policy.f:
        return policy
    return policy._replace(f=f, apply=func.through_detach(policy.apply), through_detach=True)


def findings(
    made: Iterable[func.Certificate],
    policy: Policy,
    executed: Tree | None,
    checkpoint: Checkpoint,
    logger: logging.Logger,
) -> dict[str, Any]:
    """Certificates and conditions as JSON, with the certificate of the optimizer state; failures are logged.

    Args:
        made: certificates of the run.
        policy: the checkpoint.
        executed: Δθ as it was executed; None where nothing is predicted.
        checkpoint: for its conditions.
        logger: for failures.
    """
    certificates = [*made]
    if executed is not None:
        after = None if policy.after is None else own_part(policy.after)
        certificates.append(state_against_step(executed, policy.params, after))
    worst = worst_of(certificates)
    for record in worst:
        if record["passed"] is False:
            say(logger, f"certificate {record['name']} failed: {record['detail']}", logging.WARNING)
    return {"certificates": worst, "conditions": [asdict(condition) for condition in checkpoint.conditions]}


def worst_of(made: Iterable[func.Certificate]) -> list[dict[str, Any]]:
    """Certificates as JSON, of each kind the one with the largest error; a non-finite error is null."""
    worst: dict[tuple[str, float], func.Certificate] = {}
    for certificate in made:
        key = certificate.name, certificate.bound if certificate.name in ("company", "forward") else 0.0
        if key not in worst or (worst[key].passed is not False and not certificate.error <= worst[key].error):
            worst[key] = certificate
    return [c._asdict() | {"error": c.error if isfinite(c.error) else None} for c in worst.values()]
