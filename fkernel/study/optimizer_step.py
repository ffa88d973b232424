"""Compute P and the step from U's loss gradient.

With g = −c J_Uᵀ(w A) and D = 1/(√v̂+ε), v̂ after the step or frozen (`fkernel.precond.adaptive`),

    post-step, frozen    P = lr (1−β1)/bc1 · D      calibrated: nats per unit of c w A
                         P = D                      bare
    identity             P = lr (1−β1)/bc1          calibrated: gradient descent at that rate
                         P = 1                      bare

The step itself, Δθ = batch + momentum + decay, is AdamW's for every P.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from typing import NamedTuple

import torch

from fkernel import precond
from fkernel.errors import OptimizerStateError
from fkernel.precond import AdamWState, AdamWStep, Diagonal, Grads
from fkernel.shapes import Tree
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
    state: AdamWState | None,
    ascent: Tree,
    unused: Collection[str] = (),
) -> Response:
    """Compute P and the step.

    Args:
        plan: which preconditioner.
        step: how the gradient is clipped.
        params: θ.
        state: AdamW's before the step; None without one.
        ascent: J_Uᵀ(w A) = −∇L, {name: [*shape]}.
        unused: parameters that the loss never uses: the optimizer skips them, momentum and decay included.

    Raises:
        OptimizerStateError: P needs a state and there is none, or its learning rate is 0.
    """
    g, clip, norm = clipped(step, ascent, unused)
    P = preconditioner_of(plan, params, state, g)
    return Response(P, None if state is None else precond.adamw_step(params, g, state), clip, norm)


def clipped(step: StepPlan, ascent: Tree, unused: Collection[str] = ()) -> tuple[Grads, float, float]:
    """(g = −c · ascent, c, ‖∇L‖); g is None for unused parameters."""
    g, clip, norm = precond.clip_gradient(ascent, step.max_norm, clip=step.clip)
    return {**g, **dict.fromkeys(unused)}, clip, norm


def preconditioner_of(plan: PreconditionerPlan, params: Tree, state: AdamWState | None, g: Grads) -> Diagonal:
    """Compute P from a clipped gradient.

    Raises:
        OptimizerStateError: as `response`.
    """
    needs = plan.form != "identity" or plan.calibrated
    if state is None and needs:
        raise OptimizerStateError(
            f"The checkpoint has no optimizer state, and the preconditioner {plan.form!r} needs one; take a checkpoint "
            f"that has, or ask for preconditioner: {{form: identity, calibrated: false}}."
        )
    if state is not None and plan.calibrated and not any(state.lr.values()):
        raise OptimizerStateError(
            "The learning rate of the checkpoint's next step is 0: its schedule has ended, and nothing would move. "
            "Take an earlier checkpoint, or ask for preconditioner: {calibrated: false}."
        )
    if plan.form == "identity":
        if not plan.calibrated:
            return precond.identity()
        assert state is not None
        rates = precond.gradient_rates(state)
        return precond.diagonal({name: torch.full_like(leaf, rates[name]) for name, leaf in params.items()})
    assert state is not None
    usual = "eps" if plan.form == "post-step" else "error"
    D = precond.adam(state, g if plan.form == "post-step" else None, plan.unseen or usual)
    assert isinstance(D, Diagonal)
    assert D.d is not None
    if not plan.calibrated:
        return D
    rates = {name: 0.0 if g[name] is None else rate for name, rate in precond.gradient_rates(state).items()}
    return precond.diagonal({name: rates[name] * leaf for name, leaf in D.d.items()})


def restricted(state: AdamWState, params: Tree) -> AdamWState:
    """Select the state of some parameters, on their devices.

    Example:
        >>> params = {"w": torch.zeros(1), "b": torch.zeros(1)}
        >>> restricted(precond.adamw_init(params, lr=0.1), {"b": params["b"]}).names
        ['b']
    """
    kept = {field.name: {name: getattr(state, field.name)[name] for name in params} for field in fields(state)}
    for moment in ("exp_avg", "exp_avg_sq"):
        kept[moment] = {name: leaf.to(params[name].device) for name, leaf in kept[moment].items()}
    return AdamWState(**kept)
