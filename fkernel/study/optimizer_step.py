"""Compute P and the step from U's loss gradient.

With g = −c J_Uᵀ(w A) and D = 1/(√v̂+ε), v̂ after the step or frozen (`fkernel.precond.adaptive`),

    post-step, frozen    P = lr (1−β1)/bc1 · D      calibrated: nats per unit of c w A
                         P = D                      bare
    identity             P = lr (1−β1)/bc1          calibrated: gradient descent at that rate
                         P = 1                      bare

The step itself, Δθ = batch + momentum + decay, is AdamW's for every P.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch

from fkernel import precond
from fkernel.checkpoint import STATE_PLACES
from fkernel.engine import clipped_over, own_part
from fkernel.errors import OptimizerStateError
from fkernel.precond import AdamWState, AdamWStep, Diagonal, Grads, MixedState, OptimizerState
from fkernel.shapes import Tensor, Tree
from fkernel.study.config.step import PreconditionerPlan, StepPlan


class Response(NamedTuple):
    """P and the step of a batch.

    Attributes:
        P: the preconditioner.
        step: Δθ in its three parts; None where the checkpoint has no optimizer state.
        clip: c.
        grad_norm: ‖∇L‖ before clipping.
    """

    P: Diagonal
    step: AdamWStep | None
    clip: float
    grad_norm: float


def response(
    plan: PreconditionerPlan,
    step: StepPlan,
    params: Tree,
    state: OptimizerState | None,
    ascent: Tree,
    unused: Collection[str] = (),
) -> Response:
    """Compute P and the step.

    Args:
        plan: which preconditioner.
        step: how the gradient is clipped.
        params: θ; where it is in shards, state, ascent and result are this rank's.
        state: AdamW's before the step; None without one.
        ascent: J_Uᵀ(w A) = −∇L, {name: [*shape]}.
        unused: parameters that the loss never uses: the optimizer skips them, momentum and decay included.

    Raises:
        OptimizerStateError: P needs a state and there is none, or its learning rate is 0.
    """
    g, clip, norm = clipped(step, params, ascent, unused)
    θ = own_part(params)
    P = preconditioner_of(plan, θ, state, g)
    return Response(P, None if state is None else precond.optimizer_step(θ, g, state), clip, norm)


def clipped(step: StepPlan, params: Tree, ascent: Tree, unused: Collection[str] = ()) -> tuple[Grads, float, float]:
    """(g = −c · ascent, c, ‖∇L‖); g is None for unused parameters."""
    g, clip, norm = clipped_over(params, ascent, step.max_norm, step.clip)
    return {**g, **dict.fromkeys(unused)}, clip, norm


def check_needs_no_state(plan: PreconditionerPlan, place: str | None = None) -> None:
    """Raise OptimizerStateError where a preconditioner needs a state: the checkpoint has none.

    Args:
        plan: which preconditioner.
        place: the checkpoint's directory or file, where it was looked for.
    """
    if plan.form == "identity" and not plan.calibrated:
        return
    looked = f" In {place} these were looked for: {', '.join(STATE_PLACES)}." if place else ""
    raise OptimizerStateError(
        f"The checkpoint has no optimizer state, and the preconditioner {plan.form!r} needs one.{looked} Take a "
        f"checkpoint that has one; or a recording of the run, checkpoint: {{recording: DIR, step: N}}; or ask for "
        f"preconditioner: {{form: identity, calibrated: false}}."
    )


def preconditioner_of(plan: PreconditionerPlan, params: Tree, state: OptimizerState | None, g: Grads) -> Diagonal:
    """Compute P from a clipped gradient.

    Raises:
        OptimizerStateError: as `response`.
    """
    if state is None:
        check_needs_no_state(plan)
    if state is not None and plan.calibrated and not any(rates_of(state).values()):
        raise OptimizerStateError(
            "The learning rate of the checkpoint's next step is 0: its schedule has ended, and nothing would move. "
            "Take an earlier checkpoint, or ask for preconditioner: {calibrated: false}."
        )
    if plan.form == "identity" and not plan.calibrated:
        return precond.identity()
    assert state is not None
    if plan.form == "identity":
        rates = rates_of(state)
        return precond.diagonal({name: torch.full_like(leaf, rates[name]) for name, leaf in params.items()})
    if not isinstance(state, AdamWState):
        return _secant(plan, params, state, g)
    usual = "eps" if plan.form == "post-step" else "error"
    D = precond.adam(state, g if plan.form == "post-step" else None, plan.unseen or usual)
    assert isinstance(D, Diagonal)
    assert D.d is not None
    if not plan.calibrated:
        return D
    rates = {name: 0.0 if g[name] is None else rate for name, rate in precond.gradient_rates(state).items()}
    return precond.diagonal({name: rates[name] * leaf for name, leaf in D.d.items()})


def _secant(plan: PreconditionerPlan, params: Tree, state: OptimizerState, g: Grads) -> Diagonal:
    """P of another optimizer than AdamW: the step's own, which has its learning rate in it."""
    kind = type(state).__name__.removesuffix("State")
    if plan.form == "frozen" or not plan.calibrated:
        raise OptimizerStateError(
            f"preconditioner: {{form: {plan.form}, calibrated: {str(plan.calibrated).lower()}}} is AdamW's, and the "
            f"checkpoint's optimizer is {kind}; leave preconditioner out, or ask for {{form: identity}}."
        )
    P = precond.response(state, g, params)
    if not isinstance(P, Diagonal):
        raise OptimizerStateError(
            f"{kind} mixes coordinates, so that its P is no diagonal, and plans stream diagonals alone; fkernel."
            f"explain_step takes its state, or ask for preconditioner: {{form: identity}}."
        )
    return P


def rates_of(state: OptimizerState) -> dict[str, float]:
    """Learning rates of a plain gradient step, by parameter: for AdamW with the batch's share of its average."""
    if isinstance(state, AdamWState):
        return precond.gradient_rates(state)
    return {name: float(state.of(name).lr) for name in state.names}


def restricted(state: OptimizerState, params: Tree) -> OptimizerState:
    """Keep the state of some parameters, on their devices.

    Example:
        >>> params = {"w": torch.zeros(1), "b": torch.zeros(1)}
        >>> restricted(precond.adamw_init(params, lr=0.1), {"b": params["b"]}).names
        ['b']
    """
    kept = state.restricted(params)
    if isinstance(kept, MixedState):
        return MixedState(tuple(restricted(part, {name: params[name] for name in part.names}) for part in kept.parts))
    moved = {
        each.name: {name: _beside(leaf, params[name]) for name, leaf in value.items()}
        for each in fields(kept)
        if isinstance(value := getattr(kept, each.name), Mapping)
    }
    return replace(kept, **moved)


def _beside(value: Any, like: Tensor) -> Any:
    return value.to(like.device) if isinstance(value, Tensor) else value
