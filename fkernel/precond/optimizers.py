"""Preconditioners that an influence could be computed with, each at the gradient of the step in question.

    identity     lr (1−β1)/bc1
    frozen       lr (1−β1)/bc1 · 1/(√v̂+ε), v̂ stored       coordinates that were never seen are left out
    post-step    lr (1−β1)/bc1 · 1/(√v̂'+ε)                 P_step: what AdamW does
    adamw, rmsprop, lion   −(F(g) − F(0))/g                coordinate by coordinate: `fkernel.precond.secant`
    adafactor, muon        −∂F/∂g, made to meet the move   `fkernel.precond.broyden`

F(g) is the step on g. Applied to the ascent −g, each of the last five gives F(g) − F(0), the move that its optimizer
makes of g: the derivative along g would not do, since it is 0 for an optimizer that does not see the scale of g.

Every one has AdamW's learning rates, which may differ between parameters; RMSprop has its β2 and ε, too, and Adafactor
its number of steps. Lion's β1 and Muon's μ are their own usual ones.

Another optimizer's state is not in AdamW's checkpoint; it is made of what is there: v̂ for a second moment (its means
over rows and columns for Adafactor), m for a momentum. Muon moves matrices, as far as AdamW would, and AdamW the rest,
as trainings with it do.

Source: J. Liu et al., "Muon is scalable for LLM training" (2025), for the size of Muon's moves beside AdamW's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from fkernel.boundary import public
from fkernel.errors import OptimizerStateError
from fkernel.precond.adaptive import adam, adamw_response, gradient_rates
from fkernel.precond.linearization import broyden, partition, secant
from fkernel.precond.state import AdamWState, check_covers, check_tree
from fkernel.precond.transform import Diagonal, Preconditioner, diagonal, identity
from fkernel.precond.updates import (
    AdafactorState,
    LionState,
    MuonState,
    RMSpropState,
    adafactor,
    adamw,
    lion,
    muon,
    rmsprop,
)
from fkernel.shapes import Tree

NAMES = ("identity", "frozen", "post-step", "adamw", "rmsprop", "adafactor", "lion", "muon")


@public
def alternatives(
    params: Tree,
    grads: Tree,
    state: AdamWState,
    matrices: Collection[str] | None = None,
    which: Collection[str] = NAMES,
) -> dict[str, Preconditioner]:
    """Make preconditioners to compare.

    Args:
        params: θ.
        grads: g = c ∇L of the step, {name: [*shape]}.
        state: AdamW's before the step.
        matrices: names that Muon would move; by default whatever has two dimensions.
        which: of `fkernel.precond.optimizers.NAMES`.

    Returns:
        {name: P}, in the order of `which`.

    Raises:
        OptimizerStateError: a name is not known, "frozen" is asked for before the first step, or a move is not finite.
        TreeError: the trees are about other parameters.

    Example:
        >>> import torch
        >>> from fkernel.precond import adamw_init
        >>> params = {"w": torch.ones(2)}
        >>> made = alternatives(params, params, adamw_init(params, lr=0.1), which=["identity", "post-step"])
        >>> {name: P({"w": torch.ones(2)})["w"].tolist() for name, P in made.items()}
        {'identity': [0.1..., 0.1...], 'post-step': [0.1..., 0.1...]}
    """
    for what, given in (("params", params), ("grads", grads)):
        check_tree(given, what)
    check_covers(state, list(params), params, "params")
    check_covers(state, list(grads), grads, "grads")
    rates = gradient_rates(state)
    made: dict[str, Callable[[], Preconditioner]] = {
        "identity": lambda: _rated(identity(), rates),
        "frozen": lambda: _rated(adam(state, None, "zero"), rates),
        "post-step": lambda: adamw_response(state, {**grads}),
        "adamw": lambda: secant(adamw, grads, state),
        "rmsprop": lambda: _rated(secant(rmsprop, grads, _rmsprop(state)), state.lr),
        "adafactor": lambda: _rated(broyden(adafactor, grads, _adafactor(params, state)), state.lr),
        "lion": lambda: _rated(secant(lion, grads, LionState(state.exp_avg, lr=1.0)), state.lr),
        "muon": lambda: _muon(grads, state, matrices),
    }
    if unknown := [name for name in which if name not in made]:
        raise OptimizerStateError(f"{unknown[0]!r} is no preconditioner that is known; expected {', '.join(made)}.")
    return {name: made[name]() for name in which}


def _rated(P: Preconditioner, rates: Mapping[str, float]) -> Preconditioner:
    """x ↦ rate · P x, each parameter at its own."""
    return lambda x: {name: rates[name] * leaf for name, leaf in P(x).items()}


def _v_hat(state: AdamWState) -> Tree:
    """v / (1 − β2^t); v itself, which is 0, before the first step."""
    shares = {name: 1 - state.beta2[name] ** t if t else 1.0 for name, t in state.step.items()}
    return {name: v / shares[name] for name, v in state.exp_avg_sq.items()}


def _rmsprop(state: AdamWState) -> RMSpropState:
    return RMSpropState(_v_hat(state), lr=1.0, alpha=state.beta2, eps=state.eps)


def _adafactor(params: Tree, state: AdamWState) -> AdafactorState:
    v = _v_hat(state)
    flat = {name for name, leaf in v.items() if leaf.ndim < 2}
    return AdafactorState(
        row_var={name: leaf.mean(-1, keepdim=True) for name, leaf in v.items() if name not in flat},
        col_var={name: leaf.mean(-2, keepdim=True) for name, leaf in v.items() if name not in flat},
        variance={name: v[name] for name in flat},
        scale={name: float(leaf.square().mean().sqrt()) for name, leaf in params.items()},
        step=state.step,
    )


def _muon(grads: Tree, state: AdamWState, matrices: Collection[str] | None) -> Preconditioner:
    """Muon for matrices, at the learning rate that gives them the size of AdamW's moves; AdamW for the rest."""
    chosen = [name for name, g in grads.items() if g.ndim == 2 and (matrices is None or name in matrices)]
    parts: dict[Sequence[str], Preconditioner] = {}
    for name in chosen:
        o, i = grads[name].shape
        lr = state.lr[name] * 0.2 * max(o, i) ** 0.5 / max(1.0, o / i) ** 0.5
        parts[(name,)] = broyden(muon, {name: grads[name]}, MuonState({name: state.exp_avg[name]}, lr=lr))
    if rest := tuple(name for name in grads if name not in chosen):
        response = adamw_response(state, {**grads})
        assert isinstance(response, Diagonal)
        assert response.d is not None
        parts[rest] = diagonal({name: response.d[name] for name in rest})
    return partition(parts)
