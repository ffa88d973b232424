"""From a plan to a workspace: U, its gradients, P; made, gone on with, or opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

from fkernel.checkpoint import Checkpoint
from fkernel.func.gradient import plan_of
from fkernel.kernel import recycled
from fkernel.kernel.sides import Ordered, check_sides, cuts_of, pieces_of
from fkernel.precond import AdamWStep
from fkernel.rollout import check_temperature
from fkernel.rollout.batch import GeneratedBatch
from fkernel.study.directory import WorkspaceDirectory
from fkernel.study.plan import FisherKernelPlan
from fkernel.study.policy import asked_of, policy_of
from fkernel.study.response import response
from fkernel.study.rows import grant_of
from fkernel.study.workspace import KernelWorkspace, held_in_memory, named_errors, tokens_of


class Prepared(NamedTuple):
    """What a plan's requests are asked of.

    Attributes:
        workspace: U.
        step: Δθ; None where there is no optimizer state, or P is not calibrated: then nothing is predicted.
    """

    workspace: KernelWorkspace
    step: AdamWStep | None


def prepared(
    plan: FisherKernelPlan,
    checkpoint: Checkpoint,
    make: Callable[[], GeneratedBatch],
    tick: Callable[[int, int], Any] = lambda n, total: None,
) -> Prepared:
    """Make U's workspace, go on with one that was cut off, or open one that is complete.

    Args:
        plan: what is to be in it.
        checkpoint: the plan's, loaded.
        make: makes U: draws it, reads it, or takes what was handed in.
        tick: called with (sequences whose gradients are done now, all of them).

    Raises:
        FKernelError: the batch or the place where gradients are kept is at fault.
    """
    given = None if plan.update.kind == "update" else _weighted(make())
    asked = asked_of(plan, checkpoint, given)
    if not plan.storage.persist:
        return _made(plan, checkpoint, given or _weighted(make()), asked, None, tick)
    directory = WorkspaceDirectory(plan.workspace_path, asked)
    with ExitStack() as stack:
        stack.callback(directory.opened.close)
        batch = directory.batch(lambda: given or _weighted(make()), checkpoint.provenance.fingerprint)
        found = _made(plan, checkpoint, batch, asked, directory, tick)
        stack.pop_all()
    return found


def _weighted(batch: GeneratedBatch) -> GeneratedBatch:
    """Say now what lacks a weight or an advantage, and not after an hour."""
    batch.loss_weights  # noqa: B018 - raises
    return batch


def _made(
    plan: FisherKernelPlan,
    checkpoint: Checkpoint,
    batch: GeneratedBatch,
    asked: Mapping[str, Any],
    directory: WorkspaceDirectory | None,
    tick: Callable[[int, int], Any],
) -> Prepared:
    """Compute what is missing of U's gradients, then P from them."""
    policy = policy_of(plan, checkpoint, asked["temperature"])
    if batch.sampling is not None:
        check_temperature(batch.sampling.temperature, asked["temperature"])
    U = tokens_of(batch, policy.params)

    def told(n: int) -> None:
        tick(n, len(batch))

    with named_errors(batch), recycled():
        check_sides(policy.f, policy.params, U, U)
        side = Ordered("U", U)
        grant = grant_of(plan.numerics.memory, plan.numerics.microbatch, policy, U)
        cuts = (directory and directory.cuts()) or cuts_of(side, grant.microbatch * max(side.tokens))
        pieces = pieces_of(policy.f, policy.params, side, cuts, plan_of(policy.f, policy.params, U))
        if directory is None:
            gradients = held_in_memory(side, cuts, pieces, told)
        else:
            gradients = directory.gradients(side, cuts, pieces, told, U.input_ids.device)
        ascent = gradients.weighted_sum(batch.loss_weights.to(next(iter(policy.params.values()))))
    found = response(plan.preconditioner, plan.step, policy.params, policy.state, ascent)
    if directory is not None and directory.complete is None:
        directory.seal(found.P, found.clip, found.grad_norm)
    place, opened = (None, None) if directory is None else (directory.path, directory.opened)
    workspace = KernelWorkspace(batch, gradients, found.P, found.clip, found.grad_norm, asked, place, opened)
    return Prepared(workspace, found.step if plan.preconditioner.calibrated else None)
