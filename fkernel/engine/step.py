"""One AdamW step, explained: what it does to log π of every sequence of E, and which sequence of U did it.

With g = −c Σ_u w_u A_u ∇S_u and Δθ = batch + momentum + decay (`fkernel.precond.adam`),

    ΔS_e = Σ_u C_eu + momentum_e + decay_e + ½ Δθᵀ H_e Δθ + O(|Δθ|³)
    C_eu = c w_u A_u ⟨∇S_e, P_step ∇S_u⟩
    momentum_e = ⟨∇S_e, Δθ_momentum⟩,  decay_e = ⟨∇S_e, Δθ_decay⟩

All in nats; positive means that the log-probability of the row's sequence rises.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from einops import rearrange

from fkernel import func, tree
from fkernel.engine.fisher import kernel
from fkernel.engine.planning import Strategy, choose, usual_microbatch
from fkernel.engine.planning.passes import bytes_of, fit, forward, reverse, twice_forward
from fkernel.engine.recycling import recycled
from fkernel.engine.sides import check_sides, naming
from fkernel.func.along import true_derivative
from fkernel.func.batch import length
from fkernel.func.boundary import check_weights, explained
from fkernel.func.certified import plan_of
from fkernel.func.objective import Function
from fkernel.func.unused import unused_parameters
from fkernel.precond import AdamWState, AdamWStep, adamw_response, adamw_step, clip_factor
from fkernel.precond.adam import Grads
from fkernel.precond.state import check_covers
from fkernel.shapes import Tensor, Tree


class StepEffect(NamedTuple):
    """What one step does to E, in nats.

    Attributes:
        kernel: [n_E n_U] ⟨∇S_e, P_step ∇S_u⟩, nats per unit of c·w_u·A_u.
        contributions: [n_E n_U] C, nats: what sequence u did to sequence e.
        momentum: [n_E] nats, from gradients of earlier steps.
        decay: [n_E] nats, from weight decay.
        curvature: [n_E] nats, ½ ΔθᵀH_eΔθ.
        clip: c, the factor of gradient clipping.
        grad_norm: ‖∇L‖ before clipping.
    """

    kernel: Tensor
    contributions: Tensor
    momentum: Tensor
    decay: Tensor
    curvature: Tensor
    clip: float
    grad_norm: float

    @property
    def batch(self) -> Tensor:
        """[n_E] nats, Σ_u C_eu: what the update batch did."""
        return self.contributions.sum(1)

    @property
    def first_order(self) -> Tensor:
        """[n_E] nats, batch + momentum + decay."""
        return self.batch + self.momentum + self.decay

    @property
    def second_order(self) -> Tensor:
        """[n_E] nats, the first order and the curvature of S along the step."""
        return self.first_order + self.curvature


def loss_gradient(
    f: Function,
    params: Tree,
    U: Any,
    weights: Tensor,
    *,
    max_norm: float | None = None,
    microbatch: int | None = None,
) -> tuple[Tree, float, float]:
    """Compute the gradient that the optimizer is given.

    g = c ∇L,  L = −Σ_u w_u A_u S_u,  c = min(1, max_norm / (‖∇L‖ + 1e−6))

    Args:
        f: S, (params, batch) -> [n].
        params: θ before the step.
        U: the update batch.
        weights: [n_U], w_u·A_u: loss weight times advantage.
        max_norm: clipping threshold, None for none.
        microbatch: as in `fkernel.kernel`.

    Returns:
        (g {name: [*shape]}, c, ‖∇L‖ before clipping). A parameter that f never uses has zeros here and None in torch,
        whose optimizer leaves it alone: `func.unused.unused_parameters` tells which ones these are.

    Raises:
        As `func.vjp`; OptimizerStateError where max_norm is not positive.

    Example:
        >>> import torch
        >>> f = lambda params, x: x @ params["w"]
        >>> loss_gradient(f, {"w": torch.zeros(2)}, torch.eye(2), torch.tensor([3.0, 4.0]), max_norm=10.0)
        ({'w': tensor([-3., -4.])}, 1.0, 5.0)
    """
    check_weights(weights, length(U))
    with naming("U"):
        gradient = func.vjp(f, usual_microbatch(microbatch, U))(params, U, -weights)
    clip = clip_factor(gradient, max_norm)
    return tree.scale(clip, gradient), clip, float(tree.norm(gradient))


def explain_step(
    f: Function,
    params: Tree,
    E: Any,
    U: Any,
    weights: Tensor,
    state: AdamWState,
    *,
    max_norm: float | None = None,
    memory: int | str | None = None,
    microbatch: int | None = None,
) -> tuple[StepEffect, AdamWStep]:
    """Explain the step that AdamW takes on U, sequence by sequence, before it is taken.

    ΔS_e = Σ_u C_eu + momentum_e + decay_e + ½ ΔθᵀH_eΔθ + O(|Δθ|³), as derived in `fkernel.engine.step`.

    Args:
        f: S, (params, batch) -> [n], nats.
        params: θ before the step; every parameter that the optimizer moves.
        E: the sequences whose change is to be explained.
        U: the update batch.
        weights: [n_U], w_u·A_u: loss weight times advantage (1/n_U times the advantage where the loss is a mean).
        state: AdamW's state before the step.
        max_norm: the gradient-clipping threshold, None for none.
        memory: a promise as in `kernel`; vectors of the step, about six of the parameters' size, count too.
        microbatch: as in `fkernel.kernel`.

    Returns:
        (StepEffect, AdamWStep): the effect on E in nats, and Δθ in its three parts; 0 of a parameter that f never uses,
        which torch's optimizer leaves alone, momentum and decay included.

    Raises:
        BatchError, TreeError, ModelError, NonFiniteError, OptimizerStateError: the inputs are at fault.

    Example:
        >>> import torch
        >>> from fkernel import precond
        >>> f = lambda params, x: x @ params["w"]
        >>> params = {"w": torch.zeros(2)}
        >>> state = precond.adamw_init(params, lr=0.1, weight_decay=0.0)
        >>> effect, step = explain_step(f, params, torch.eye(2), torch.eye(2), torch.tensor([1.0, -1.0]), state)
        >>> effect.contributions
        tensor([[ 0.1000, -0.0000],
                [ 0.0000, -0.1000]])
    """
    check_sides(f, params, E, U)
    check_covers(state, list(params), params, "params")
    # Alive beside the kernel: g, P_step and the three parts of Δθ; beside the curvature, their sum.
    microbatch, passes = usual_microbatch(microbatch, E, U), (reverse, forward, twice_forward)
    m, needed = fit(memory, microbatch, f, params, (E, U), passes, vectors=6)
    with explained(params):
        plan = plan_of(f, params, E)
    strategy = choose(f, params, E, U, plan, memory, microbatch, False, False, 5 * bytes_of(params), needed)
    with recycled():
        return _explained(f, params, E, U, weights, state, max_norm, m, strategy)


def _explained(
    f: Function,
    params: Tree,
    E: Any,
    U: Any,
    weights: Tensor,
    state: AdamWState,
    max_norm: float | None,
    m: int,
    strategy: Strategy,
) -> tuple[StepEffect, AdamWStep]:
    g, clip, norm = loss_gradient(f, params, U, weights, max_norm=max_norm, microbatch=m)
    with naming("U"):
        given: Grads = {**g, **dict.fromkeys(unused_parameters(f, params, U))}
    step = adamw_step(params, given, state)
    with naming("E"), explained(params):
        S = true_derivative(f, params, E, step.total)
    K = kernel(f, params, E, U, adamw_response(state, given), strategy=strategy, rows=S)
    jvp = func.jvp(S, m)
    with naming("E"):
        effect = StepEffect(
            kernel=K,
            contributions=K * rearrange(clip * weights.to(K), "u -> 1 u"),
            momentum=jvp(params, E, step.momentum),
            decay=jvp(params, E, step.decay),
            curvature=0.5 * func.curvature(S, m)(params, E, step.total),
            clip=clip,
            grad_norm=norm,
        )
    return effect, step


def realised_change(f: Function, before: Tree, after: Tree, E: Any, *, microbatch: int | None = None) -> Tensor:
    """Measure what a step really did: ΔS_e = S_e(θ + Δθ) − S_e(θ).

    Args:
        f: S, (params, batch) -> [n].
        before: θ.
        after: θ + Δθ; the same names, shapes and dtypes.
        E: the sequences.
        microbatch: as in `fkernel.kernel`.

    Returns:
        [n_E] nats.

    Raises:
        TreeError: the two trees do not name the same parameters.
        BatchError, NonFiniteError: as f.

    Example:
        >>> import torch
        >>> f = lambda params, x: x @ params["w"]
        >>> realised_change(f, {"w": torch.zeros(2)}, {"w": torch.ones(2)}, torch.eye(2))
        tensor([1., 1.])
    """
    tree.check_same(after, before, "after", "before")
    S = func.evaluate(f, usual_microbatch(microbatch, E))
    with naming("E"):
        return S(after, E) - S(before, E)
