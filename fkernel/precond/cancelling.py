"""Where sequences cancel: coordinates whose whole gradient is far smaller than what adds up to it.

A secant is exact for the sum: P g = −(F(g) − F(0)). Where g_α = Σ_u g_uα is far smaller than Σ_u |g_uα|, a small move
is split into large shares of opposite signs, and P_α, which divides by g_α, is large.
"""

from __future__ import annotations

import torch

from fkernel import tree
from fkernel.boundary import public
from fkernel.errors import OptimizerStateError
from fkernel.precond.state import check_tree
from fkernel.shapes import Tree


@public
def cancellation(grads: Tree, absolute: Tree, diagonal: Tree, share: float = 0.01) -> float:
    """Tell how much of what sequences are credited with rests on coordinates where they cancel.

    Σ_α∈C |P_α| Σ_u |g_uα| / Σ_α |P_α| Σ_u |g_uα|,  C: |g_α| < share · Σ_u |g_uα|

    Args:
        grads: g, {name: [*shape]}, the whole batch's.
        absolute: Σ_u |g_uα|, {name: [*shape]}.
        diagonal: P, {name: [*shape]}, such as `response(…).d`.
        share: below which part of Σ_u |g_uα| a coordinate counts as cancelled.

    Returns:
        Between 0 and 1; 0 where nothing is credited.

    Raises:
        OptimizerStateError: Σ_u |g_uα| is less than |g_α|: it is of other sequences.
        TreeError: the trees are about other parameters.

    Example:
        >>> g = {"w": torch.tensor([1.0, 0.001])}
        >>> cancellation(g, {"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([1.0, 3.0])})
        0.75
    """
    for what, given in (("grads", grads), ("absolute", absolute), ("diagonal", diagonal)):
        check_tree(given, what)
        tree.check_finite(given, what)
    tree.check_same(absolute, grads, "absolute", "the gradient")
    tree.check_same(diagonal, grads, "the diagonal", "the gradient")
    whole = cancelled = 0.0
    for name, g in grads.items():
        if bool((g.abs() > absolute[name] * 1.01).any()):
            raise OptimizerStateError(
                f"Σ|g_u| of {name!r} is less than |Σ g_u| in places: it is of other sequences, or of other weights."
            )
        mass = diagonal[name].abs().double() * absolute[name].double()
        whole += float(mass.sum())
        cancelled += float(torch.where(g.abs() < share * absolute[name], mass, 0.0).sum())
    return cancelled / whole if whole else 0.0
