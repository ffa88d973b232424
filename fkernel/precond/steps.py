"""Any optimizer's step taken apart, batch + momentum + decay, and the preconditioner that belongs to it.

With F the rule in h = ±g + λ'θ (λ' decay that is added to the gradient, λ decoupled decay; − where it climbs),

    momentum   F(0)                                          the step without any gradient
    batch      ∓P g                                          adds up over sequences: Σ_u ∓P g_u
    decay      −P λ'θ − lr λ θ
    P          −(F(h) − F(0)) / h, coordinate by coordinate  `fkernel.precond.secant`; its derivative where h = 0
               −∂F/∂h, made to meet F(h) − F(0)              `fkernel.precond.broyden`, for Muon and Adafactor

so that batch + momentum + decay is the step, to rounding, whatever the optimizer. Decay in the gradient is a summand of
h as each sequence is, and has its share of the move. AdamW's D is held at v' instead (`fkernel.precond.adamw_step`):
there the step is linear in g as it stands.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fkernel import tree
from fkernel.boundary import public
from fkernel.errors import TreeError, listing
from fkernel.precond.adaptive import AdamWStep, Grads, adamw_response, adamw_step
from fkernel.precond.base import DecayingState, OptimizerState
from fkernel.precond.linearization import broyden, partition, secant
from fkernel.precond.state import AdamWState, check_covers, check_state, check_tree
from fkernel.precond.transform import Diagonal, Preconditioner, diagonal
from fkernel.precond.updates import optimizer_of
from fkernel.shapes import Tree


@dataclass(frozen=True, eq=False)
class MixedState(OptimizerState):
    """Several optimizers' states, each of some parameters: Muon for matrices with AdamW for the rest.

    Attributes:
        parts: the states; every parameter is in exactly one.

    Raises:
        TreeError: a parameter is in two parts.
    """

    parts: tuple[OptimizerState, ...]

    def __post_init__(self) -> None:
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise TreeError(f"The states of a mixed optimizer have {listing(twice)} in more than one part.")

    @property
    def names(self) -> list[str]:
        """The parameters, part by part."""
        return [name for part in self.parts for name in part.names]

    def restricted(self, names: Iterable[str]) -> MixedState:
        """As each part does it; one that has none of them is left out."""
        wanted = list(names)
        kept = [part.restricted([name for name in wanted if name in part.names]) for part in self.parts]
        return MixedState(tuple(part for part in kept if part.names))

    def misfit(self, name: str, shape: tuple[int, ...]) -> str:
        """As each part has it."""
        return next(part.misfit(name, shape) for part in self.parts if name in part.names)


@public
def acts_by_coordinate(state: OptimizerState) -> bool:
    """Tell whether every coordinate's move depends on its own gradient alone, so that P is a diagonal.

    Args:
        state: any optimizer's.

    Example:
        >>> from fkernel.precond.updates import LionState
        >>> acts_by_coordinate(LionState({"w": torch.zeros(1)}, lr=0.5))
        True
    """
    parts = state.parts if isinstance(state, MixedState) else (state,)
    return all(isinstance(part, AdamWState) or optimizer_of(part).coordinatewise for part in parts)


@public
def optimizer_step(params: Tree, grads: Grads, state: OptimizerState) -> AdamWStep:
    """Compute Δθ of one step of any optimizer in its three parts; nothing is changed in place.

    Args:
        params: θ before the step, {name: [*shape]}.
        grads: g = c ∇L, after clipping; None for a parameter without gradient (it does not move at all).
        state: the optimizer's before the step: `AdamWState`, one of `fkernel.precond.updates`, or a `MixedState`.

    Returns:
        AdamWStep(batch, momentum, decay), each {name: [*shape]}; for AdamW that of `adamw_step`.

    Raises:
        OptimizerStateError: the state is of no optimizer that is known, or a move is not finite.
        TreeError: params, grads and state do not name the same parameters with the same shapes.
        NonFiniteError: a gradient or parameter is NaN or infinite.

    Example:
        >>> from fkernel.precond.updates import LionState
        >>> params = {"w": torch.tensor([1.0])}
        >>> state = LionState({"w": torch.tensor([-1.0])}, lr=0.5, weight_decay=0.1)
        >>> [round(part["w"].item(), 4) for part in optimizer_step(params, {"w": torch.tensor([40.0])}, state)]
        [-1.0, 0.5, -0.05]
    """
    if isinstance(state, AdamWState):
        return adamw_step(params, grads, state)
    _check(params, grads, state)
    if isinstance(state, MixedState):
        steps = [
            optimizer_step(_some(params, part.names), _some(grads, part.names), part)
            for part in state.parts
            if part.names
        ]
        return AdamWStep(*({name: leaf for step in steps for name, leaf in step[i].items()} for i in range(3)))
    h, coupled = _rule_gradient(params, grads, state)
    update = optimizer_of(state).update
    momentum = update(tree.zeros_like(h), state)
    if coupled:
        P = _of_rule(h, state)
        batch = tree.scale(-1.0, P(tree.add(h, tree.scale(-1.0, coupled))))
        decay = tree.scale(-1.0, P(coupled))
    else:
        batch, decay = tree.add(update(h, state), tree.scale(-1.0, momentum)), tree.zeros_like(h)
    decay = {name: leaf - _decoupled(state, name) * params[name] for name, leaf in decay.items()}
    still = {name: torch.zeros_like(leaf) for name, leaf in params.items()}
    return AdamWStep(still | batch, still | momentum, still | decay)


@public
def response(state: OptimizerState, grads: Grads, params: Tree, unseen: Any = "eps") -> Preconditioner:
    """Make P of a step: from a score's gradient to the move of the parameters that it causes in this very step.

    Σ_u P(−g_u) is the step's batch part, for any shares Σ_u g_u = g

    Args:
        state: as in `optimizer_step`.
        grads: as in `optimizer_step`; it decides about P. A parameter whose gradient is None is left alone: P is 0.
        params: θ, for the decay that some optimizers add to the gradient.
        unseen: as in `adamw_response`, for AdamW alone.

    Returns:
        A diagonal preconditioner where every coordinate's move depends on its own gradient alone: for all but Muon and
        Adafactor. ⟨∇S_e, P ∇S_u⟩ is in nats per unit of c·w_u·A_u. Negative where the optimizer climbs.

    Raises:
        As `optimizer_step`.

    Example:
        >>> from fkernel.precond.updates import LionState
        >>> g = {"w": torch.tensor([4.0])}
        >>> response(LionState({"w": torch.zeros(1)}, lr=0.5), g, {"w": torch.ones(1)})({"w": torch.ones(1)})
        {'w': tensor([0.1250])}
    """
    if isinstance(state, AdamWState):
        return adamw_response(state, grads, unseen)
    _check(params, grads, state)
    if isinstance(state, MixedState):
        made: dict[Sequence[str], Preconditioner] = {
            tuple(part.names): response(part, _some(grads, part.names), _some(params, part.names), unseen)
            for part in state.parts
            if part.names
        }
        diagonals = [P.d for P in made.values() if isinstance(P, Diagonal) and P.d is not None]
        if len(diagonals) < len(made):
            return partition(made)
        return diagonal({name: leaf for d in diagonals for name, leaf in d.items()})
    h, _ = _rule_gradient(params, grads, state)
    P, signs = _of_rule(h, state), {name: _sign(state, name) for name in h}
    if isinstance(P, Diagonal):
        assert P.d is not None
        still = {name: torch.zeros_like(leaf) for name, leaf in params.items() if name not in h}
        made_of = {**still, **{name: signs[name] * leaf for name, leaf in P.d.items()}}
        return diagonal({name: made_of[name] for name in params})

    def apply(x: Tree) -> Tree:
        check_tree(x, "The tree to precondition")
        tree.check_names(x, params, "the tree to precondition", "the gradient")
        moved = P(_some(x, [*h]))
        return {name: signs[name] * moved[name] if name in h else torch.zeros_like(x[name]) for name in x}

    return apply


def _check(params: Tree, grads: Grads, state: OptimizerState) -> None:
    check_state(state, OptimizerState)
    check_tree(params, "params")
    check_tree(grads, "grads")
    present = {name: g for name, g in grads.items() if g is not None}
    check_covers(state, list(params), params, "params")
    check_covers(state, list(grads), present, "grads")
    tree.check_names(grads, params, "grads", "params")
    tree.check_finite(params, "params")
    tree.check_finite(present, "grads")


def _some(x: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: x[name] for name in names}


def _sign(state: OptimizerState, name: str) -> float:
    return -1.0 if state.of(name).maximize else 1.0


def _decoupled(state: OptimizerState, name: str) -> float:
    """How far decoupled decay goes along −θ."""
    past = state.of(name)
    assert isinstance(state, DecayingState)
    return state.decay_step(past) * past.weight_decay if past.decoupled_weight_decay and past.weight_decay else 0.0


def _rule_gradient(params: Tree, grads: Grads, state: OptimizerState) -> tuple[Tree, Tree]:
    """h = ±g + λ'θ of the parameters that have a gradient, and λ'θ; {} where no λ' is there."""
    signed = {name: _sign(state, name) * g for name, g in grads.items() if g is not None}
    pasts = {name: state.of(name) for name in signed}
    if all(past.decoupled_weight_decay or not past.weight_decay for past in pasts.values()):
        return signed, {}
    rates = {name: 0.0 if past.decoupled_weight_decay else past.weight_decay for name, past in pasts.items()}
    coupled = {name: rate * params[name] for name, rate in rates.items()}
    return tree.add(signed, coupled), coupled


def _of_rule(h: Tree, state: OptimizerState) -> Preconditioner:
    """P of the rule itself, in h."""
    optimizer = optimizer_of(state)
    return (secant if optimizer.coordinatewise else broyden)(optimizer.update, h, state)
