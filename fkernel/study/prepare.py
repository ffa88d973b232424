"""Create, resume or open the workspace of a plan: U, its gradients, P."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch

from fkernel import tree
from fkernel.checkpoint import Checkpoint
from fkernel.distributed import Group
from fkernel.engine import (
    Gradients,
    ShardedGradients,
    SortedBatch,
    Summing,
    WalkedGradients,
    check_side,
    computed,
    cuts_of,
    kept_or_returned,
    walking_alone,
)
from fkernel.engine.planning import HELD, usual_microbatch
from fkernel.errors import PlanError, RolloutError
from fkernel.func import Sequences, unused_parameters
from fkernel.precond import AdamWStep
from fkernel.rollout import GeneratedBatch, SampleGenerator, check_temperature, split_advantages
from fkernel.shapes import Tensor, Tree
from fkernel.study.config.plan import FisherKernelPlan
from fkernel.study.directory import WorkspaceDirectory
from fkernel.study.draws import UpdateDraw, check_rewards
from fkernel.study.from_dump import check_step
from fkernel.study.log import doing
from fkernel.study.loss_terms import LossTerms
from fkernel.study.losses import terms_of
from fkernel.study.optimizer_step import check_needs_no_state, response
from fkernel.study.policy import policy_of, spec_of, temperature_of
from fkernel.study.preferences import weighed
from fkernel.study.rows import MemoryBudget, Policy, grant_of
from fkernel.study.workspace import KernelWorkspace, beside, named_errors, tokens_of


class WorkspaceAndStep(NamedTuple):
    """The inputs of every request.

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
    group: Group | None = None,
) -> WorkspaceAndStep:
    """Create U's workspace, resume an interrupted one, or open a complete one.

    Args:
        plan: the plan.
        checkpoint: the plan's, loaded.
        make: returns U: drawn, read from a file, or passed in.
        on_progress: called with (sequences done since the last call, total).
        generator: makes the sample generator; a stored U is rewarded again, and compared, where the reward function's
            source has no file to hash.
        group: the ranks that compute U's gradients together, and keep them in memory; None for this process alone.

    Raises:
        FKernelError: the batch, its rewards or the workspace's directory is invalid.
    """
    check_step(plan, checkpoint)
    given = None if plan.update.kind == "update" else make()
    if given is not None:
        _check_weights(plan, given)
    policy = policy_of(plan, checkpoint, temperature_of(plan, given))
    if policy.state is None:
        check_needs_no_state(plan.preconditioner, plan.checkpoint.place)
    spec = spec_of(plan, checkpoint, given)
    if policy.padding_idx is not None:
        spec["padding"] = policy.padding_idx

    def ready() -> GeneratedBatch:
        return _ready(plan, policy, make() if given is None else given)

    def check(batch: GeneratedBatch) -> None:
        if isinstance(plan.update, UpdateDraw) and generator is not None and None in spec["update"]["code"].values():
            preference = plan.step.loss is not None and plan.step.loss.kind == "preference"
            check_rewards(plan.update, generator(), batch, preference)

    if not plan.storage.persist or group is not None:
        return _made(plan, checkpoint, policy, ready(), spec, None, on_progress, group)
    directory = WorkspaceDirectory(plan.workspace_path, spec)
    with ExitStack() as stack:
        stack.callback(directory.opened.close)
        opened = _made(plan, checkpoint, policy, directory.batch(ready, check), spec, directory, on_progress)
        stack.pop_all()
    return opened


def _weights(batch: GeneratedBatch, policy: Policy, loss: LossTerms | None) -> Tensor:
    """[n_U] a, what columns are weighed with in the ascent direction, before clipping."""
    like = next(iter(policy.params.values()))
    return like.new_ones(len(batch)) if loss is not None and loss.whole else batch.weighted_advantages.to(like)


def _check_weights(plan: FisherKernelPlan, batch: GeneratedBatch) -> None:
    """Raise early where a record lacks what the loss is made of."""
    kind = None if plan.step.loss is None else plan.step.loss.kind
    if kind == "token_weights":
        if not {*batch.token_weights, *batch.entropy_weights}:
            raise RolloutError(
                "step.loss is {kind: token_weights}, and U's records have none; give the batch its ω with "
                "batch.with_token_weights({part: [n t]}), or name the loss."
            )
    elif kind != "preference":
        batch.weighted_advantages  # noqa: B018 - raises


def _ready(plan: FisherKernelPlan, policy: Policy, batch: GeneratedBatch) -> GeneratedBatch:
    """Check U and set a preference loss's advantages and weights."""
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
    group: Group | None = None,
) -> WorkspaceAndStep:
    """Compute the missing gradients of U and their weighted sum, then P and the step."""
    if batch.sampling is not None:
        check_temperature(batch.sampling.temperature, spec["temperature"])
    tokens = tokens_of(batch, policy.params)

    def report_progress(n: int) -> None:
        on_progress(n, len(batch))

    with named_errors(batch), kept_or_returned(group):
        with doing("certifying the model on U"):
            check_side("U", policy.f, policy.params, tokens)
        where = "memory" if directory is None and group is None else "disk"
        grant = grant_of(plan.numerics.memory, plan.numerics.microbatch, policy, tokens, where, group)
        loss = _terms(plan, checkpoint, policy, batch, tokens, grant.microbatch, directory)
        f, U = policy.columns_for(tokens, loss)
        side = SortedBatch("U", U, f)
        walks, w = group is None or plan.numerics.shards, _weights(batch, policy, loss)
        how = walking_alone(f, policy.params, side, plan.numerics.memory) if walks else None
        done = directory is not None and directory.complete is not None
        if how is None:
            keep = _kept if group is None else partial(_kept_by_ranks, group)
            gradients, total = keep(side, policy, w, grant, directory, report_progress)
        else:
            gradients = WalkedGradients(side, policy.params, how, 0 if done else len(side))
            total = partial(gradients.weighted_sum, w, report_progress)

        if not done and plan.step.parts is not None:
            loss = _split(plan, batch, gradients, loss)
        if directory is not None and done:
            ascent = beside(directory.ascent(), policy.params)
        else:
            with doing("the batch's gradient"):
                ascent = total()
            for part in () if loss is None else loss.beside_columns.values():
                ascent = tree.add(ascent, part)
        unused = unused_parameters(f, policy.params, U)
    effect = response(plan.preconditioner, plan.step, policy.params, policy.state, ascent, unused)
    if directory is not None and not done:
        directory.seal(effect.P, effect.clip, effect.grad_norm, ascent, loss, gradients.walked)
    stored = (lambda: ascent, spec, None, None)
    if directory is not None:
        stored = (directory.ascent, spec, directory.path, directory.opened)
    workspace = KernelWorkspace(batch, gradients, effect.P, effect.clip, effect.grad_norm, *stored, loss)
    step = effect.step if plan.preconditioner.calibrated else None
    return WorkspaceAndStep(workspace, step, policy._replace(unused=unused))


def _split(plan: FisherKernelPlan, batch: GeneratedBatch, gradients: Gradients, loss: LossTerms | None) -> LossTerms:
    """Split the columns' sum by reward function, or by the advantages' signs: one more sum over U each."""
    if plan.step.parts == "signs":
        A = batch.advantages
        parts = {"raised": A.clamp(min=0), "lowered": A.clamp(max=0)}
    else:
        rule = plan.step.rule or getattr(plan.update, "advantage", None)
        if rule is None:
            raise PlanError("step.parts: rewards needs the rule of U's advantages; give step.rule.")
        parts = split_advantages(batch, rule)
    w = batch.with_values("advantage", torch.ones(len(batch))).weighted_advantages
    vectors = {name: gradients.weighted_sum((w * A).to(gradients.dtype)) for name, A in parts.items()}
    terms = loss or LossTerms(None, {"kind": "policy_gradient"})
    return terms._replace(parts={**vectors, **terms.parts}, within=tuple(vectors))


def _kept(
    side: SortedBatch,
    policy: Policy,
    w: Tensor,
    grant: MemoryBudget,
    directory: WorkspaceDirectory | None,
    report_progress: Callable[[int], Any],
) -> tuple[Gradients, Callable[[], Tree]]:
    """Compute the missing gradients of U; returns them, and a function that returns their sum weighted by w."""
    cuts = (directory and directory.cuts()) or cuts_of(side, grant.microbatch * max(side.tokens))
    # Without a memory limit, up to HELD / 2 bytes stay in memory as well: every request reads them again.
    held = 0 if directory is None or grant.memory is not None else HELD // 2
    summing = Summing(computed(side, ((1.0, policy.params),), cuts), w, held)
    if directory is None:
        gradients = summing.gradients.in_memory(report_progress)
    else:
        device = next(iter(policy.params.values())).device
        stored = directory.gradients(side, cuts, summing.gradients.read, report_progress, device)
        gradients = stored.remembering(summing.held, held)
    return gradients, lambda: summing.whole(gradients)


def _kept_by_ranks(
    group: Group,
    side: SortedBatch,
    policy: Policy,
    w: Tensor,
    grant: MemoryBudget,
    directory: WorkspaceDirectory | None,
    report_progress: Callable[[int], Any],
) -> tuple[Gradients, Callable[[], Tree]]:
    """Compute U's gradients on all ranks, and keep each one's shards in memory; there is no directory."""
    assert directory is None
    tokens = grant.microbatch * side.tokens[0]
    gradients = ShardedGradients(side, policy.params, tokens, group, grant.memory is not None)
    report_progress(len(side))
    return gradients, partial(gradients.weighted_sum, w)


def adopted(plan: FisherKernelPlan, workspace: KernelWorkspace, policy: Policy) -> AdamWStep | None:
    """Compute Δθ for a workspace opened without its plan; None without optimizer state, or where P is not calibrated.

    Δθ comes from the stored ascent direction; no gradient is read. Unstored gradients of long sequences get the model.
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
    """Read the loss terms of a complete workspace; else compute them."""
    if directory is not None and directory.complete is not None:
        kept = directory.loss()
        return None if kept is None else kept.beside(policy.params)
    return terms_of(plan.step.loss, batch, policy, tokens, microbatch, checkpoint.provenance.fingerprint)
