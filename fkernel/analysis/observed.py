"""What a step does to anything else than log π, and which sequence of U did it.

The rows of a kernel may be gradients of any observable f(params, batch) -> [n], such as those of `fkernel.func`; its
columns are still ∇S of what the optimizer was trained on:

    Δf_e = Σ_u C_eu + momentum_e + decay_e + ½ ΔθᵀH_eΔθ + O(|Δθ|³),   C_eu = c w_u A_u ⟨∇f_e, P_step ∇S_u⟩
"""

from __future__ import annotations

from typing import Any

from fkernel import func
from fkernel.engine import StepEffect, loss_gradient, recycled
from fkernel.engine.planning import usual_microbatch
from fkernel.func.batch import length
from fkernel.func.boundary import check_weights, explained
from fkernel.func.objective import Function
from fkernel.precond import AdamWState, Diagonal, adamw_response, adamw_step
from fkernel.precond.adam import Grads
from fkernel.shapes import Tensor, Tree


def explain_observable(
    observable: Function,
    f: Function,
    params: Tree,
    E: Any,
    U: Any,
    weights: Tensor,
    state: AdamWState,
    *,
    max_norm: float | None = None,
    microbatch: int | None = None,
) -> StepEffect:
    """Explain what the step that AdamW takes on U does to an observable of E.

    Args:
        observable: (params, E) -> [n_E], such as `func.mean_entropy(apply)`.
        f: S, (params, U) -> [n_U], whose weighted sum is the loss. Parameters that it never uses are left alone by
            the step, momentum and decay included.
        params: θ.
        E: what the observable takes.
        U: the update batch.
        weights: [n_U], w_u·A_u.
        state: AdamW's state before the step.
        max_norm: the gradient-clipping threshold, None for none.
        microbatch: as in `fkernel.kernel`; gradients of both sides are held whole.

    Returns:
        As `fkernel.explain_step`, in the observable's unit instead of nats.

    Raises:
        As `fkernel.explain_step`.

    Example:
        >>> import torch
        >>> from fkernel import precond
        >>> f, square = (lambda params, x: x @ params["w"]), (lambda params, x: (x @ params["w"]).square())
        >>> params = {"w": torch.ones(2)}
        >>> state = precond.adamw_init(params, lr=0.1, weight_decay=0.0)
        >>> explain_observable(square, f, params, torch.eye(2), torch.eye(2), torch.ones(2), state).contributions
        tensor([[0.2000, 0.0000],
                [0.0000, 0.2000]])
    """
    check_weights(weights, length(U))
    m = usual_microbatch(microbatch, E, U)
    with recycled():
        g, clip, norm = loss_gradient(f, params, U, weights, max_norm=max_norm, microbatch=m)
        given: Grads = {**g, **dict.fromkeys(func.unused_parameters(f, params, U))}
        step, P = adamw_step(params, given, state), adamw_response(state, given)
        assert isinstance(P, Diagonal)
        with explained(params):
            whole = func.true_derivative(observable, params, E, step.total)
        rows, columns = (func.per_sequence_handles(each, m)(params, x) for each, x in ((whole, E), (f, U)))
        K, jvp = func.contract(rows, columns, diagonal=P.d), func.jvp(whole, m)
        return StepEffect(
            kernel=K,
            contributions=K * (clip * weights.to(K)),
            momentum=jvp(params, E, step.momentum),
            decay=jvp(params, E, step.decay),
            curvature=0.5 * func.curvature(whole, m)(params, E, step.total),
            clip=clip,
            grad_norm=norm,
        )
