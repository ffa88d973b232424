"""Any optimizer's update F: (g, state) → Δθ as a preconditioner: its secant, or its Jacobian, at the gradient g.

    secant       P_α = −(F_α(g) − F_α(0)) / g_α             coordinate by coordinate; the derivative where g_α = 0
    linearized   P x = −(∂F/∂g) x                           what an infinitesimally larger weight would do
    broyden      P x = −(∂F/∂g) x + (y − y') ⟨g, x⟩/⟨g, g⟩   y = −(F(g) − F(0)), y' = −(∂F/∂g) g

A step's contributions must add up to the step: P(−g) = F(g) − F(0), the move that g makes. The Jacobian's do not: an
optimizer that does not see the scale of g, as AdamW and Adafactor at their first step, moves no further along g, and so
(∂F/∂g) g = 0. Where an optimizer works coordinate by coordinate, the secant is exact and complete: sequence u's share
of the move of coordinate α is g_uα/g_α of it, as along the straight path from 0 to g. Where it does not (Muon,
Adafactor), Broyden's correction is the least change of the Jacobian that makes it meet the move.

For AdamW with D held fixed the Jacobian is P_step of `fkernel.precond.adamw_response`; as a whole, v' moves with g.

Source: C. Broyden, "A class of methods for solving nonlinear simultaneous equations" (1965), for the correction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fkernel import tree
from fkernel.boundary import public
from fkernel.errors import OptimizerStateError, TreeError, listing
from fkernel.precond.state import check_tree
from fkernel.precond.transform import Diagonal, Preconditioner, diagonal
from fkernel.shapes import Tensor, Tree

Update = Callable[[Tree, Any], Tree]
"""(g, state) → Δθ, pure and differentiable in g."""


@public
def secant(update: Update, grads: Tree, state: Any) -> Diagonal:
    """Make P from the move of an optimizer that works coordinate by coordinate.

    P_α = −(F_α(g) − F_α(0)) / g_α, so that Σ_u P(−g_u) = F(g) − F(0) for any shares Σ_u g_u = g

    Where g_α is 0, or too small to divide by, P_α is the derivative −∂F_α/∂g_α.

    Args:
        update: F, (g, state) → Δθ, whose every coordinate depends on its own g alone: those of
            `fkernel.precond.updates` but Muon and Adafactor, and any of your own. It need not be differentiable where
            g is not 0.
        grads: g = c ∇L of the whole batch, {name: [*shape]}.
        state: the optimizer's before the step.

    Returns:
        A diagonal preconditioner; ⟨∇S_e, P ∇S_u⟩ is in nats per unit of c·w_u·A_u.

    Raises:
        OptimizerStateError: a move is not finite.
        NonFiniteError: the derivative is not finite where g_α is 0.

    Example:
        >>> sign = lambda g, lr: {name: -lr * leaf.sign() for name, leaf in g.items()}
        >>> secant(sign, {"w": torch.tensor([4.0, -0.5])}, 1.0)({"w": torch.ones(2)})
        {'w': tensor([0.2500, 2.0000])}
    """
    check_tree(grads, "grads")
    y = _ascent_of(update, grads, state)
    small = {name: g.abs() < torch.finfo(g.dtype).tiny for name, g in grads.items()}
    d = {name: y[name] / torch.where(small[name], 1.0, g) for name, g in grads.items()}
    if any(bool(some.any()) for some in small.values()):
        slope = linearized(update, grads, state)({name: torch.ones_like(g) for name, g in grads.items()})
        d = {name: torch.where(small[name], slope[name], leaf) for name, leaf in d.items()}
    return diagonal(d)


@public
def broyden(update: Update, grads: Tree, state: Any) -> Preconditioner:
    """Make P from the Jacobian and the move of any optimizer.

    P x = J x + (y − J g) ⟨g, x⟩/⟨g, g⟩,  J = −∂F/∂g,  y = −(F(g) − F(0)),  each parameter by itself

    Args:
        update: F, (g, state) → Δθ, such as `fkernel.precond.updates`' Adafactor and Muon. A parameter's move depends on
            its own gradient.
        grads: g = c ∇L of the whole batch, {name: [*shape]}.
        state: the optimizer's before the step.

    Returns:
        A preconditioner, for vectors and for rows: P(−g) = F(g) − F(0); on what is orthogonal to g it is `linearized`.

    Raises:
        OptimizerStateError: a move is not finite.
        TreeError: (when called) the tree is about other parameters.

    Example:
        >>> unit = lambda g, lr: {name: -lr * leaf / leaf.norm() for name, leaf in g.items()}
        >>> g = {"w": torch.tensor([3.0, 4.0])}
        >>> broyden(lambda g, lr: unit(g, lr) if g["w"].any() else g, g, 1.0)(g)  # linearized: 0
        {'w': tensor([0.6000, 0.8000])}
    """
    check_tree(grads, "grads")
    J, y = linearized(update, grads, state), _ascent_of(update, grads, state)
    gap = tree.add(y, tree.scale(-1.0, J(grads)))

    @public
    def apply(x: Tree) -> Tree:
        return {name: leaf + _along(grads[name], x[name]) * gap[name] for name, leaf in J(x).items()}

    return apply


def _ascent_of(update: Update, grads: Tree, state: Any) -> Tree:
    """y = −(F(g) − F(0)): the move that g makes, as P makes it of g.

    Raises:
        OptimizerStateError: it is not finite.
    """
    y = tree.add(update(tree.zeros_like(grads), state), tree.scale(-1.0, update(grads, state)))
    for name, leaf in y.items():
        if not tree.all_finite(leaf):
            raise OptimizerStateError(
                f"The optimizer's move of {name!r} is not finite in {int((~torch.isfinite(leaf)).sum())} of "
                f"{leaf.numel()} coordinates, with this gradient or without any; an ε of 0 divides by zero where the "
                f"second moment is 0: give the optimizer a positive eps."
            )
    return y


def _along(g: Tensor, x: Tensor) -> Tensor:
    """⟨g, x⟩/⟨g, g⟩ of a vector or of each row, to be multiplied with a vector; 0 where g is 0."""
    largest = g.abs().max()
    unit = g / torch.where(largest > 0, largest, 1.0)
    own = tuple(range(x.ndim - g.ndim, x.ndim))
    share = (unit * x).sum(own, keepdim=True) / unit.square().sum().clamp(min=1.0)  # its largest entry is ±1
    return share / torch.where(largest > 0, largest, 1.0)


@public
def linearized(update: Update, grads: Tree, state: Any) -> Preconditioner:
    """Make P from an optimizer's update.

    P x = −d/dh Δθ(g + h x) at h = 0

    Args:
        update: (g, state) → Δθ, such as those of `fkernel.precond.updates`.
        grads: g = c ∇L of the whole batch, {name: [*shape]}.
        state: the optimizer's before the step.

    Returns:
        A preconditioner, for vectors and for rows; ⟨∇S_e, P ∇S_u⟩ is in nats per unit of c·w_u·A_u.

    Raises:
        TreeError: (when called) the tree is about other parameters.

    Example:
        >>> sgd = lambda g, lr: {name: -lr * leaf for name, leaf in g.items()}
        >>> linearized(sgd, {"w": torch.zeros(2)}, 0.5)({"w": torch.ones(2)})
        {'w': tensor([0.5000, 0.5000])}
    """
    check_tree(grads, "grads")

    def along(x: Tree) -> Tree:
        both: Any = torch.func.jvp(lambda g: update(g, state), (grads,), (x,))
        return tree.scale(-1.0, both[1])

    @public
    def apply(x: Tree) -> Tree:
        check_tree(x, "The tree to precondition")
        tree.check_names(x, grads, "the tree to precondition", "the gradient")
        rows = {name: leaf.ndim > grads[name].ndim for name, leaf in x.items()}
        if not any(rows.values()):
            return along(x)
        return torch.func.vmap(along)(x)

    return apply


@public
def partition(parts: Mapping[Sequence[str], Preconditioner]) -> Preconditioner:
    """Make a preconditioner of several, each for some parameters, as a training that mixes optimizers has.

    Args:
        parts: {names: P}; every parameter in exactly one.

    Raises:
        TreeError: a name is in two parts, or (when called) the tree's names are not the parts'.

    Example:
        >>> from fkernel.precond import diagonal, identity
        >>> P = partition({("w",): diagonal({"w": torch.tensor([2.0])}), ("b",): identity()})
        >>> P({"w": torch.ones(1), "b": torch.ones(1)})
        {'w': tensor([2.]), 'b': tensor([1.])}
    """
    named = [name for names in parts for name in names]
    twice = sorted({name for name in named if named.count(name) > 1})
    if twice:
        raise TreeError(f"partition has {listing(twice)} in more than one part.")

    @public
    def apply(x: Tree) -> Tree:
        check_tree(x, "The tree to precondition")
        tree.check_names(x, named, "the tree to precondition", "the partition")
        mapped: Tree = {}
        for names, P in parts.items():
            mapped |= P({name: x[name] for name in names})
        return {name: mapped[name] for name in x}

    return apply
