"""AdamW as `torch.optim.AdamW` executes it, taken apart into linear pieces.

With the loss L = −Σ_u w_u A_u S_u, the gradient g = c ∇L (c: the clipping factor), and the step t → t+1,

    m' = β1 m + (1−β1) g        bc1 = 1 − β1^(t+1)
    v' = β2 v + (1−β2) g²       bc2 = 1 − β2^(t+1)
    Δθ = −lr · (m'/bc1) · D − lr · λ · θ        D = 1 / (√(v'/bc2) + ε), elementwise

Given D, Δθ is linear in (g, m, θ), so it splits exactly:

    batch      −lr (1−β1)/bc1 · D · g
    momentum   −lr β1/bc1 · D · m
    decay      −lr λ θ

Two forms of D: `frozen` takes the stored second moment, v̂ = v/(1−β2^t); `post-step` takes v' with the batch's own
gradient in it, which is what the optimizer divides by. They agree as β2 → 1 at a large t.

P_step = lr (1−β1)/bc1 · D maps a gradient of the score to the move that it causes, so ⟨∇S_e, P_step ∇S_u⟩ is in nats
for each unit of c·w_u·A_u. P is applied once. Dividing both gradients by √v̂+ε would be gᵀP²g'.

Source: D. P. Kingma & J. Ba, "Adam" (2015), Algorithm 1; I. Loshchilov & F. Hutter, "Decoupled weight decay
regularization" (2019), Algorithm 2.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from fkernel import tree
from fkernel.boundary import public
from fkernel.errors import OptimizerStateError, listing
from fkernel.precond.state import AdamWState, check_covers, check_state, check_tree
from fkernel.precond.transform import Preconditioner, diagonal
from fkernel.shapes import Tensor, Tree

Unseen = Literal["error", "zero", "eps"]
Grads = dict[str, Tensor | None]
"""A gradient by name; None marks a parameter that received none, which AdamW then leaves alone, decay included."""


class AdamWStep(NamedTuple):
    """Δθ in its three exact parts, each {name: [*shape]} in units of the parameters; their sum is the step."""

    batch: Tree
    momentum: Tree
    decay: Tree

    @property
    def total(self) -> Tree:
        """Δθ = batch + momentum + decay."""
        return tree.add(*self)


@public
def adam(state: AdamWState, grads: Grads | None = None, unseen: Unseen = "error") -> Preconditioner:
    """Make P = D = diag 1/(√v̂+ε): Adam's diagonal, without learning rate, momentum or decay.

    Args:
        state: the checkpoint's AdamW state.
        grads: None for the frozen form; the step's (clipped) loss gradient g for the post-step form.
        unseen: what becomes of a coordinate whose second moment is exactly zero, where D = 1/ε ≈ 1e8 would swamp
            everything: "error" counts and names them, "zero" leaves them out, "eps" takes 1/ε as the optimizer does.

    Returns:
        A diagonal preconditioner; units 1/gradient.

    Raises:
        OptimizerStateError: the frozen form at step 0, or unseen coordinates under "error".
        TreeError: state and grads name different parameters or shapes.

    Example:
        >>> from fkernel.precond import adamw_init
        >>> state = adamw_init({"w": torch.zeros(2)}, lr=1e-3)
        >>> adam(state, {"w": torch.tensor([4.0, -2.0])})({"w": torch.ones(2)})  # at t = 0, √v̂' = |g|
        {'w': tensor([0.2500, 0.5000])}
    """
    return diagonal(_inverse_root(state, grads, unseen))


@public
def adamw_response(state: AdamWState, grads: Grads, unseen: Unseen = "eps") -> Preconditioner:
    """Make P_step: from a score's gradient to the move of the parameters that it causes in this very step.

    P_step = lr (1−β1)/bc1 · 1/(√(v'/bc2)+ε)

    Args:
        state: the AdamW state before the step.
        grads: the loss gradient g = c ∇L of the whole batch, after clipping; it enters v'. A parameter whose gradient
            is None is left alone by the optimizer: its response is 0.
        unseen: as in `adam`. The default takes 1/ε, which is what the optimizer does.

    Returns:
        A diagonal preconditioner. ⟨∇S_e, P_step ∇S_u⟩ is in nats per unit of c·w_u·A_u.

    Raises:
        As `adam`.

    Example:
        >>> from fkernel.precond import adamw_init
        >>> state = adamw_init({"w": torch.zeros(1)}, lr=0.5)
        >>> adamw_response(state, {"w": torch.tensor([4.0])})({"w": torch.ones(1)})
        {'w': tensor([0.1250])}
    """
    D = _inverse_root(state, grads, unseen)
    rate = gradient_rates(state)
    return diagonal({name: (0.0 if grads[name] is None else rate[name]) * D[name] for name in D})


@public
def gradient_rates(state: AdamWState) -> dict[str, float]:
    """Tell how far a step goes along D g, parameter by parameter: what turns a bare D into nats.

    lr (1−β1)/bc1, with which the batch's part of the step is −lr (1−β1)/bc1 · D · g whatever form D has

    Args:
        state: the AdamW state before the step.

    Example:
        >>> from fkernel.precond import adamw_init
        >>> gradient_rates(adamw_init({"w": torch.zeros(1)}, lr=0.5))
        {'w': 0.5}
    """
    check_state(state)
    return {name: _rate(state, name) * (1 - state.beta1[name]) for name in state.names}


@public
def adamw_step(params: Tree, grads: Grads, state: AdamWState) -> AdamWStep:
    """Compute Δθ of one AdamW step in its three parts; nothing is changed in place.

    batch = −lr(1−β1)/bc1·D·g,  momentum = −lr β1/bc1·D·m,  decay = −lr λ θ

    Args:
        params: θ before the step.
        grads: g = c ∇L, after clipping; None for a parameter without gradient (it does not move at all).
        state: the AdamW state before the step.

    Returns:
        AdamWStep(batch, momentum, decay), each {name: [*shape]}, units of the parameters.

    Raises:
        TreeError: params, grads and state do not name the same parameters with the same shapes.
        NonFiniteError: a gradient or parameter is NaN or infinite.

    Example:
        >>> from fkernel.precond import adamw_init
        >>> params = {"w": torch.tensor([1.0])}
        >>> step = adamw_step(params, {"w": torch.tensor([4.0])}, adamw_init(params, lr=0.5, weight_decay=0.1))
        >>> [round(part["w"].item(), 4) for part in step]
        [-0.5, -0.0, -0.05]
    """
    check_tree(params, "params")
    _check_grads(state, grads)
    check_covers(state, list(params), params, "params")
    tree.check_finite(params, "params")
    D = _inverse_root(state, grads, "eps")
    batch: Tree = {}
    momentum: Tree = {}
    decay: Tree = {}
    for name, theta in params.items():
        g = grads[name]
        if g is None:
            batch[name], momentum[name], decay[name] = (torch.zeros_like(theta) for _ in range(3))
            continue
        towards = -_rate(state, name) * D[name]
        batch[name] = towards * (1 - state.beta1[name]) * g
        momentum[name] = towards * state.beta1[name] * state.exp_avg[name]
        decay[name] = -state.lr[name] * state.weight_decay[name] * theta
    return AdamWStep(batch, momentum, decay)


def _rate(state: AdamWState, name: str) -> float:
    """Return lr / bc1 of the step t → t+1."""
    return state.lr[name] / (1 - state.beta1[name] ** (state.step[name] + 1))


def _inverse_root(state: AdamWState, grads: Grads | None, unseen: Unseen) -> Tree:
    """D = 1/(√v̂+ε), with v̂ frozen (grads None) or after the step."""
    check_state(state)
    if unseen not in ("error", "zero", "eps"):
        raise OptimizerStateError(f"unseen is {unseen!r}; expected 'error', 'zero' or 'eps'.")
    if grads is not None:
        _check_grads(state, grads)
    D: Tree = {}
    never: dict[str, int] = {}
    for name in state.names:
        v_hat = _second_moment(state, name, None if grads is None else grads[name], frozen=grads is None)
        dark = v_hat == 0
        if unseen == "error" and bool(dark.any()):
            never[name] = int(dark.sum())
        if state.eps[name] == 0 and unseen != "zero" and bool(dark.any()):
            raise OptimizerStateError(
                f"eps is 0 and the second moment of {name!r} is 0 in {int(dark.sum())} place(s): the optimizer divides "
                f"by zero there; use a positive eps, or unseen='zero'."
            )
        root = v_hat.sqrt() + state.eps[name]
        D[name] = torch.where(dark, 0.0, 1 / root) if unseen == "zero" else 1 / root
    if never:
        _raise_unseen(never, state)
    return D


def _second_moment(state: AdamWState, name: str, g: Tensor | None, frozen: bool) -> Tensor:
    v, beta2, t = state.exp_avg_sq[name], state.beta2[name], state.step[name]
    if frozen:
        if t == 0:
            raise OptimizerStateError(
                f"{name!r} is at step 0: nothing has been accumulated, so the frozen form has no v̂ (its bias "
                f"correction is 0/0). Give grads= for the post-step form, or take a checkpoint after the first step."
            )
        return v / (1 - beta2**t)
    if g is not None:
        v, t = beta2 * v + (1 - beta2) * g * g, t + 1
    return v / (1 - beta2**t) if t else v


def _check_grads(state: AdamWState, grads: Grads) -> None:
    check_tree(grads, "grads")
    present = {name: g for name, g in grads.items() if g is not None}
    check_covers(state, list(grads), present, "grads")
    tree.check_finite(present, "grads")


def _raise_unseen(never: dict[str, int], state: AdamWState) -> None:
    count = sum(never.values())
    total = tree.size(state.exp_avg_sq)
    raise OptimizerStateError(
        f"{count} of {total} coordinates never received a gradient (second moment exactly 0), in {len(never)} "
        f"parameter(s): {listing([f'{name}: {k}' for name, k in never.items()])}. There 1/(√v̂+ε) = 1/ε would swamp the "
        f"kernel. Choose unseen='zero' to leave them out, or unseen='eps' to take 1/ε as the optimizer would."
    )
