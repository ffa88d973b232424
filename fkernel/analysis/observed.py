"""What a step does to anything else than log π, and which sequence of U did it.

The rows of a kernel may be gradients of any observable f(params, batch) -> [n], such as those of `fkernel.func`; its
columns are still ∇S of what the optimizer was trained on:

    Δf_e = Σ_u C_eu + momentum_e + decay_e + O(|Δθ|³),   C_eu = c w_u A_u ⟨∇f_e(θ + ½Δθ), P_step ∇S_u⟩
"""

from __future__ import annotations

from typing import Any

from fkernel.engine import StepEffect, explain_step
from fkernel.engine.path import Path
from fkernel.func.objective import Function
from fkernel.precond import AdamWState
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
    path: Path = "midpoint",
    max_norm: float | None = None,
    memory: int | str | None = None,
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
        path: as the next three, as in `fkernel.explain_step`.
        max_norm: the gradient-clipping threshold, None for none.
        memory: a promise.
        microbatch: sequences under way at once.

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
        tensor([[0.2100, 0.0000],
                [0.0000, 0.2100]])
    """
    given = {"path": path, "max_norm": max_norm, "memory": memory, "microbatch": microbatch}
    effect, _ = explain_step(f, params, E, U, weights, state, rows=observable, **given)
    return effect
