"""From a plan to a workspace: U, its gradients, P; made, gone on with, or opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

from fkernel import tree
from fkernel.checkpoint import Checkpoint
from fkernel.engine import (
    Gradients,
    SortedBatch,
    Summing,
    WalkedGradients,
    check_side,
    computed,
    cuts_of,
    gradient_sum,
    reuse_memory,
    walking_alone,
)
from fkernel.engine.planning import HELD, usual_microbatch
from fkernel.func import Sequences, unused_parameters
from fkernel.precond import AdamWStep
from fkernel.rollout import GeneratedBatch, SampleGenerator, check_temperature
from fkernel.shapes import Tensor, Tree
from fkernel.study.config.plan import FisherKernelPlan
from fkernel.study.directory import WorkspaceDirectory
from fkernel.study.draws import UpdateDraw, check_rewards
from fkernel.study.loss_terms import LossTerms
from fkernel.study.losses import terms_of, weighed
from fkernel.study.optimizer_step import response
from fkernel.study.policy import policy_of, spec_of, temperature_of
from fkernel.study.rows import MemoryBudget, Policy, grant_of
from fkernel.study.workspace import KernelWorkspace, beside, named_errors, tokens_of


class WorkspaceAndStep(NamedTuple):
    """What a plan's requests are asked of.

    Attributes:
        workspace: U.
        step: Δθ; None where there is no optimizer state, or P is not calibrated: then nothing is predicted.
        policy: the checkpoint as the engine takes it.
    """

    workspace: KernelWorkspace
    step: AdamWStep | None
    policy: Policy


def prepared(
    plan: FisherKernelPlan,
    checkpoint: Checkpoint,
    make: Callable[[], GeneratedBatch],
    on_progress: Callable[[int, int], Any] = lambda n, total: None,
    generator: Callable[[], SampleGenerator] | None = None,
) -> WorkspaceAndStep:
    """Make U's workspace, go on with one that was cut off, or open one that is complete.

    Args:
        plan: what is to be in it.
        checkpoint: the plan's, loaded.
        make: makes U: draws it, reads it, or takes what was handed in.
        on_progress: called with (sequences whose gradients are done now, all of them).
        generator: makes the sample generator, with which a U that an earlier run drew is rewarded again where the
            function has no file that could tell whether it was edited.

    Raises:
        FKernelError: the batch, its rewards or the place where gradients are kept is at fault.
    """
    given = None if plan.update.kind == "update" else make()
    if given is not None:
        _check_weights(plan, given)
    policy = policy_of(plan, checkpoint, temperature_of(plan, given))
    spec = spec_of(plan, checkpoint, given)
    if policy.padding_idx is not None:
        spec["padding"] = policy.padding_idx

    def ready() -> GeneratedBatch:
        return _ready(plan, policy, make() if given is None else given)

    def check(batch: GeneratedBatch) -> None:
        if isinstance(plan.update, UpdateDraw) and generator is not None and None in spec["update"]["code"].values():
            weighed = plan.step.loss is not None and plan.step.loss.kind == "preference"
            check_rewards(plan.update, generator(), batch, weighed)

    if not plan.storage.persist:
        return _made(plan, checkpoint, policy, ready(), spec, None, on_progress)
    directory = WorkspaceDirectory(plan.workspace_path, spec)
    with ExitStack() as stack:
        stack.callback(directory.opened.close)
        found = _made(plan, checkpoint, policy, directory.batch(ready, check), spec, directory, on_progress)
        stack.pop_all()
    return found


def _weights(batch: GeneratedBatch, policy: Policy) -> Tensor:
    return batch.weighted_advantages.to(next(iter(policy.params.values())))


def _check_weights(plan: FisherKernelPlan, batch: GeneratedBatch) -> None:
    """Say now what lacks a weight or an advantage, and not after an hour."""
    if plan.step.loss is None or plan.step.loss.kind != "preference":
        batch.weighted_advantages  # noqa: B018 - raises


def _ready(plan: FisherKernelPlan, policy: Policy, batch: GeneratedBatch) -> GeneratedBatch:
    """Set the weights that the loss sets."""
    _check_weights(plan, batch)
    tokens = tokens_of(batch, policy.params)
    with named_errors(batch):
        return weighed(plan.step.loss, batch, policy, tokens, usual_microbatch(plan.numerics.microbatch, tokens))


def _made(
    plan: FisherKernelPlan,
    checkpoint: Checkpoint,
    policy: Policy,
    batch: GeneratedBatch,
    spec: Mapping[str, Any],
    directory: WorkspaceDirectory | None,
    on_progress: Callable[[int, int], Any],
) -> WorkspaceAndStep:
    """Compute what is missing of U's gradients and their sum, then P from it."""
    if batch.sampling is not None:
        check_temperature(batch.sampling.temperature, spec["temperature"])
    tokens = tokens_of(batch, policy.params)

    def told(n: int) -> None:
        on_progress(n, len(batch))

    with named_errors(batch), reuse_memory():
        check_side("U", policy.f, policy.params, tokens)
        where = "memory" if directory is None else "disk"
        grant = grant_of(plan.numerics.memory, plan.numerics.microbatch, policy, tokens, where)
        loss = _terms(plan, checkpoint, policy, batch, tokens, grant.microbatch, directory)
        f, U = policy.columns_for(tokens, loss)
        side = SortedBatch("U", U, f)
        how, w = walking_alone(f, policy.params, side, plan.numerics.memory), _weights(batch, policy)
        done = directory is not None and directory.complete is not None
        if how is None:
            gradients, total = _kept(side, policy, w, grant, directory, told)
        else:
            gradients = WalkedGradients(side, policy.params, how, 0 if done else len(side))
            total = partial(gradient_sum, side, policy.params, w, how, on_progress=told)

        if directory is not None and done:
            ascent = beside(directory.ascent(), policy.params)
        else:
            ascent = total()
            if loss is not None and loss.penalty is not None:
                ascent = tree.add(ascent, loss.penalty)
        unused = unused_parameters(f, policy.params, U)
    found = response(plan.preconditioner, plan.step, policy.params, policy.state, ascent, unused)
    if directory is not None and not done:
        directory.seal(found.P, found.clip, found.grad_norm, ascent, loss, gradients.walked)
    kept = (lambda: ascent, spec, None, None)
    if directory is not None:
        kept = (directory.ascent, spec, directory.path, directory.opened)
    workspace = KernelWorkspace(batch, gradients, found.P, found.clip, found.grad_norm, *kept, loss)
    policy = policy._replace(unused=unused)
    return WorkspaceAndStep(workspace, found.step if plan.preconditioner.calibrated else None, policy)


def _kept(
    side: SortedBatch,
    policy: Policy,
    w: Tensor,
    grant: MemoryBudget,
    directory: WorkspaceDirectory | None,
    told: Callable[[int], Any],
) -> tuple[Gradients, Callable[[], Tree]]:
    """Compute what is missing of U's gradients, to be held or read from now on; and say how they are added up."""
    cuts = (directory and directory.cuts()) or cuts_of(side, grant.microbatch * max(side.tokens))
    # What was computed is held as well as written, where no grant forbids it: it is read again for every request.
    held = 0 if directory is None or grant.memory is not None else HELD // 2
    made = Summing(computed(side, ((1.0, policy.params),), cuts), w, held)
    if directory is None:
        gradients = made.gradients.in_memory(told)
    else:
        device = next(iter(policy.params.values())).device
        gradients = directory.gradients(side, cuts, made.gradients.read, told, device).remembering(made.held, held)
    return gradients, lambda: made.whole(gradients)


def adopted(plan: FisherKernelPlan, workspace: KernelWorkspace, policy: Policy) -> AdamWStep | None:
    """Make Δθ of a workspace that was opened by itself; None where there is none. Long sequences get a model to walk.

    Δθ is made of the ascent that the workspace keeps, and no gradient is read.
    """
    f, U = policy.columns_for(tokens_of(workspace.batch, policy.params), workspace.loss)
    side = SortedBatch("U", U, f)
    if how := walking_alone(f, policy.params, side, plan.numerics.memory):
        workspace.gradients = WalkedGradients(side, policy.params, how)
    if policy.state is None or not plan.preconditioner.calibrated:
        return None
    unused = unused_parameters(f, policy.params, U)
    ascent = workspace.ascent(policy.params)
    return response(plan.preconditioner, plan.step, policy.params, policy.state, ascent, unused).step


def _terms(
    plan: FisherKernelPlan,
    checkpoint: Checkpoint,
    policy: Policy,
    batch: GeneratedBatch,
    tokens: Sequences,
    microbatch: int,
    directory: WorkspaceDirectory | None,
) -> LossTerms | None:
    """Read what the loss made of U, where the workspace is complete; else compute it."""
    if directory is not None and directory.complete is not None:
        kept = directory.loss()
        return None if kept is None else kept.beside(policy.params)
    fingerprint = checkpoint.provenance.fingerprint
    return terms_of(plan.step.loss, batch, policy, tokens, microbatch, fingerprint)
