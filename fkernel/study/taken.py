"""The step as it was executed, as it was really taken, and whether that is the step that is described.

    Δθ_after = Δθ + (Δθ_executed − Δθ) + (Δθ_after − Δθ_executed)
                    arithmetic           unexplained

The path of E's gradients ends where the step really ended, as far as that is known.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from fkernel import tree
from fkernel.analysis import Audit, Described, audit, described_step
from fkernel.checkpoint import Checkpoint
from fkernel.distributed import ShardedTree
from fkernel.engine import Microbatch, gradient_in, own_part
from fkernel.func.handles import write_out
from fkernel.precond import AdamWState, AdamWStep, ExecutedStep, Grads, cancellation, executed_step
from fkernel.shapes import Tensor, Tree
from fkernel.study.config.step import StepPlan
from fkernel.study.log import LOGGER, say
from fkernel.study.loss_terms import OWN
from fkernel.study.rows import Policy
from fkernel.study.workspace import KernelWorkspace, tokens_of

ARITHMETIC, UNEXPLAINED = "arithmetic", "unexplained"
LEFT = 0.02
"""Share of a step beyond its description from which on the audit says so."""
UNEXECUTED = (
    "the training rounds its weights or moments to half precision, and a step in shards is taken in real numbers: what "
    "rounding did is not told apart, and is part of what is unexplained (numerics.shards)"
)


class Departures(NamedTuple):
    """What a step has beyond the exact one.

    Attributes:
        vectors: {"arithmetic": …, "unexplained": …}, those that are known, {name: [*shape]} each.
        end: Δθ of the path: really taken, executed, or exact.
        executed: Δθ as it was executed; the exact one where that is not known.
    """

    vectors: dict[str, Tree]
    end: Tree
    executed: Tree


class StepTaken(NamedTuple):
    """What is known of a step beyond the exact one.

    Attributes:
        departures: what it has beyond that, and where it ended.
        moved: the share of weights whose stored value changed; None where the step was not executed.
        audit: whether it is the step that is described; None without `step.after`.
        cancellation: of another optimizer than AdamW: the share of Σ|P g_u| on coordinates where sequences cancel, so
            that a secant makes large shares of a small sum; None where U's gradients are not kept.
    """

    departures: Departures
    moved: float | None
    audit: Audit | None
    cancellation: float | None = None

    @property
    def for_policy(self) -> dict[str, Any]:
        """What requests know of it: fields of `Policy`."""
        verdict = None if self.audit is None else self.audit.verdict
        return {"step": self.departures.end, "departures": self.departures.vectors, "verdict": verdict}

    def reported(self, logger: logging.Logger) -> dict[str, Any]:
        """Facts, JSON; what the audit found is logged as warnings."""
        known = {"moved": self.moved, "cancellation": self.cancellation}
        facts: dict[str, Any] = {name: value for name, value in known.items() if value is not None}
        if self.audit is None:
            return facts
        for finding in self.audit.findings:
            say(logger, f"audit of the step: {finding.sentence}", logging.WARNING)
        return facts | {"audit": self.audit.summary()}


def step_taken(
    plan: StepPlan, policy: Policy, checkpoint: Checkpoint, workspace: KernelWorkspace, step: AdamWStep
) -> StepTaken:
    """Execute a step, tell the one really taken apart, and audit it.

    Args:
        plan: of the step.
        policy: the checkpoint, with the one after the step.
        checkpoint: for the optimizer's own state and the dtypes that were trained.
        workspace: U.
        step: Δθ in real numbers.
    """
    executed = executed_of(plan, policy, checkpoint, workspace)
    after = None if policy.after is None else own_part(policy.after)
    apart = departures(own_part(policy.params), step.total, None if executed is None else executed.delta, after)
    audited = audit_of(plan, policy, checkpoint, workspace, step, apart.vectors.get(ARITHMETIC))
    moved = None if executed is None else executed.moved
    return StepTaken(apart, moved, audited, _cancellation(policy, workspace))


def _cancellation(policy: Policy, workspace: KernelWorkspace) -> float | None:
    """Σ_α P_α Σ_u |g_uα| on coordinates where |g_α| is below a hundredth of Σ_u |g_uα|, over the whole."""
    J, d = workspace.gradients, workspace.P.d
    if policy.state is None or isinstance(policy.state, AdamWState) or J.walked or not J.whole or d is None:
        return None
    a, absolute = workspace.loss_weights.abs(), tree.zeros_like(policy.params)
    for i, rows in enumerate(J.cuts):
        n = rows.stop - rows.start
        dense = write_out([(slice(0, n), J.read(i))], policy.params, n)
        weights = a[J.side.order[rows].to(a.device)]
        absolute = {
            name: leaf + torch.tensordot(weights.to(leaf), dense[name].abs().to(leaf), 1)
            for name, leaf in absolute.items()
        }
    return cancellation(workspace.ascent(policy.params), absolute, d)


def departures(params: Tree, exact: Tree, executed: Tree | None = None, after: Tree | None = None) -> Departures:
    """Tell a step really taken apart.

    Args:
        params: θ.
        exact: Δθ in real numbers.
        executed: Δθ as the training's own precision has it; None where that is the study's.
        after: θ after the step, where it was really taken.

    Example:
        >>> import torch
        >>> θ, exact = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
        >>> departures(θ, exact, {"w": torch.tensor([0.75])}, {"w": torch.tensor([0.5])}).vectors
        {'arithmetic': {'w': tensor([-0.2500])}, 'unexplained': {'w': tensor([-0.2500])}}
    """
    vectors, own = dict[str, Tree](), exact if executed is None else executed
    end = own
    if executed is not None:
        vectors[ARITHMETIC] = tree.axpy(-1.0, exact, executed)
    if after is not None:
        taken = tree.axpy(-1.0, params, {name: after[name] for name in params})
        vectors[UNEXPLAINED], end = tree.axpy(-1.0, end, taken), taken
    return Departures(vectors, end, own)


def executed_of(
    plan: StepPlan, policy: Policy, checkpoint: Checkpoint, workspace: KernelWorkspace
) -> ExecutedStep | None:
    """Execute the step in the training's own precision; None where that is the study's.

    U's gradient is one plain pass in the dtypes of the weights, under autocast where the plan says so; then the
    optimizer's own class steps tensors of its own dtypes. Parts of the loss that no column has are exact in it.

    Raises:
        OptimizerStateError: it cannot be repeated, such as stochastic rounding.
    """
    θ = _as_trained(policy, checkpoint)
    stored = None if checkpoint.stored is None else checkpoint.stored.restricted(policy.params)
    kept = {} if stored is None else stored.dtypes
    moments = {dtype for name in policy.params for dtype in kept.get(name, ())}
    rounded = any(leaf.dtype != policy.params[name].dtype for name, leaf in θ.items())
    if policy.state is None or not (plan.autocast or rounded or moments - {"float32", "float64"}):
        return None
    if isinstance(policy.params, ShardedTree):
        say(LOGGER, UNEXECUTED, logging.WARNING)
        return None
    f, U = policy.columns_for(tokens_of(workspace.batch, policy.params), workspace.loss)
    like = next(iter(policy.params.values()))
    a = workspace.loss_weights.to(like.device, torch.float32)
    how: dict[str, Any] = {"autocast": plan.autocast, "head": plan.head, "attention": plan.attention}
    ascent = gradient_in(f, θ, U, a, microbatches=_microbatches(plan, workspace), **how)
    for part in () if workspace.loss is None else workspace.loss.beside_columns.values():
        ascent = {name: leaf + part[name].to(leaf) for name, leaf in ascent.items()}
    executed = executed_step(θ, _clipped(plan, ascent, policy.unused), stored or policy.state)
    masters = {name: executed.masters[name] - policy.params[name] for name in checkpoint.rounded if name in θ}
    return executed._replace(delta={**executed.delta, **masters})


def _clipped(plan: StepPlan, ascent: Tree, unused: Collection[str]) -> Grads:
    """g = −c · ascent as torch clips it: norm, c and product in the gradients' own dtype."""
    if plan.max_norm is None:
        return {**tree.scale(-(plan.clip or 1.0), ascent), **dict.fromkeys(unused)}
    leaves = {name: torch.nn.Parameter(torch.empty_like(leaf)) for name, leaf in ascent.items() if name not in unused}
    for name, leaf in leaves.items():
        leaf.grad = -ascent[name]
    torch.nn.utils.clip_grad_norm_(leaves.values(), plan.max_norm)
    return {name: leaves[name].grad if name in leaves else None for name in ascent}


def _microbatches(plan: StepPlan, workspace: KernelWorkspace) -> Any:
    """The training's backward passes, by rows of U."""
    if plan.microbatches is None or isinstance(plan.microbatches, int):
        return plan.microbatches
    return [
        Microbatch([workspace.row(name) for name in each.sequence_ids], each.prompt_width, each.width)
        for each in plan.microbatches
    ]


def audit_of(
    plan: StepPlan,
    policy: Policy,
    checkpoint: Checkpoint,
    workspace: KernelWorkspace,
    step: AdamWStep,
    arithmetic: Tree | None,
) -> Audit | None:
    """Hold the step really taken against the one described; None without `step.after`.

    Args:
        plan: of the step.
        policy: with the checkpoint after the step.
        checkpoint: for the dtypes that were trained.
        workspace: U.
        step: Δθ as described.
        arithmetic: what the training's own precision did beyond it, which is subtracted; None where it is the study's.
    """
    if policy.after is None:
        return None
    θ, after = own_part(policy.params), own_part(policy.after)
    taken = tree.axpy(-1.0, θ, {name: after[name] for name in θ})
    left = LEFT
    if arithmetic is not None:
        if not isinstance(plan.microbatches, tuple):  # rounding of other passes is known by its size alone
            left += 2 * float(tree.norm(arithmetic)) / (float(tree.norm(taken)) or 1.0)
        taken = tree.axpy(-1.0, arithmetic, taken)
    state = policy.state
    each = {} if state is None else {name: state.of(name) for name in policy.params}
    lr, weight_decay = (
        {name: float(getattr(one, key, 0.0)) for name, one in each.items()} for key in ("lr", "weight_decay")
    )
    gradients = _gradients(workspace, policy)
    described: AdamWStep | Described = step
    if len(gradients) > 1:
        P = workspace.P
        described = Described({k: P(tree.scale(-1.0, g)) for k, g in gradients.items()}, step.momentum, step.decay)

    def respond(scales: Mapping[str, float]) -> Described:
        scaled = {part: tree.scale(scales[part], g) for part, g in gradients.items()}
        assert isinstance(state, AdamWState)
        return described_step(θ, scaled, state)

    return audit(
        described,
        taken,
        params=_as_trained(policy, checkpoint),
        lr=lr or None,
        weight_decay=weight_decay or None,
        clip=workspace.clip,
        grad_norm=workspace.grad_norm,
        left=left,
        respond=respond if isinstance(state, AdamWState) and not policy.unused else None,
        summed=partial(_over_ranks, policy.params),
    )


def _over_ranks(params: Tree, sums: Tensor) -> Tensor:
    """Sum over ranks what each has of its shards; of whole parameters one has all."""
    if not isinstance(params, ShardedTree):
        return sums
    return params.summed(sums.to(next(iter(params.values())).device)).cpu()


def _gradients(workspace: KernelWorkspace, policy: Policy) -> dict[str, Tree]:
    """g = c ∂L/∂θ by the parts of the loss; {"batch": g} where it has one."""
    g, loss = tree.scale(-workspace.clip, workspace.ascent(policy.params)), workspace.loss
    if loss is None or not loss.parts:
        return {"batch": g}
    parts = {part: tree.scale(-workspace.clip, v) for part, v in loss.parts.items()}
    if loss.within:
        return parts
    rest = tree.axpy(-1.0, tree.add(*parts.values()), g)
    return {OWN: rest, **parts}


def _as_trained(policy: Policy, checkpoint: Checkpoint) -> Tree:
    """θ in the dtypes in which it was trained.

    Those of the checkpoint, but where torch's optimizer has float32 moments of weights in half precision, and no
    masters: torch gives moments the weights' dtype, so that these were rounded when they were saved.
    """
    dtypes, stored = dict(checkpoint.trained_dtypes), checkpoint.stored
    for name, kinds in ({} if stored is None else stored.dtypes).items():
        if kinds != ("float32",) or stored is None or name in stored.masters:
            continue
        if stored.writers[name].startswith("torch."):
            dtypes.pop(name, None)
    return {name: leaf.to(dtypes.get(name, leaf.dtype)) for name, leaf in own_part(policy.params).items()}
