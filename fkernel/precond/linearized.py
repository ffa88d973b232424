"""Any optimizer's update as a preconditioner: its Jacobian-vector product at the current gradient.

    P x = −(∂Δθ/∂g) x

A sequence whose weight grows by dw changes the loss gradient by −dw ∇S, and so the step by dw P ∇S: contributions under
this P are what an infinitesimally larger weight would do, through v', clipping by RMS and orthogonalisation alike. For
AdamW with D held fixed it is P_step of `fkernel.precond.adamw_response`; the whole Jacobian has v' move too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fkernel import tree
from fkernel.errors import TreeError, listing
from fkernel.precond.transform import Preconditioner
from fkernel.shapes import Tree

Update = Callable[[Tree, Any], Tree]
"""(g, state) → Δθ, pure and differentiable in g."""


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

    def along(x: Tree) -> Tree:
        found: Any = torch.func.jvp(lambda g: update(g, state), (grads,), (x,))
        return tree.scale(-1.0, found[1])

    def apply(x: Tree) -> Tree:
        tree.check_names(x, grads, "the tree to precondition", "the gradient")
        rows = {name: leaf.ndim > grads[name].ndim for name, leaf in x.items()}
        if not any(rows.values()):
            return along(x)
        return torch.func.vmap(along)(x)

    return apply


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

    def apply(x: Tree) -> Tree:
        tree.check_names(x, named, "the tree to precondition", "the partition")
        found: Tree = {}
        for names, P in parts.items():
            found |= P({name: x[name] for name in names})
        return {name: found[name] for name in x}

    return apply
