"""Gradient clipping: the factor by which a whole gradient is scaled, and what the optimizer is then given."""

from __future__ import annotations

import math

from fkernel import tree
from fkernel.boundary import described, public
from fkernel.errors import NonFiniteError, OptimizerStateError
from fkernel.precond.base import LARGEST
from fkernel.precond.state import check_tree
from fkernel.shapes import Tree


@public
def clip_factor(grads: Tree, max_norm: float | None) -> float:
    """Compute c = min(1, max_norm / (‖g‖₂ + 1e−6)), as `torch.nn.utils.clip_grad_norm_` does.

    Args:
        grads: the gradient before clipping, {name: [*shape]}, over all parameters that are clipped together.
        max_norm: the threshold; None or infinity for no clipping (c = 1).

    Raises:
        OptimizerStateError: max_norm is not positive.
        NonFiniteError: a gradient is NaN or infinite; torch would scale it by NaN.

    Example:
        >>> import torch
        >>> round(clip_factor({"w": torch.tensor([3.0, 4.0])}, max_norm=1.0), 4)
        0.2
    """
    check_tree(grads, "grads")
    tree.check_finite(grads, "grads")
    if max_norm is None or max_norm == math.inf:
        return 1.0
    if not isinstance(max_norm, int | float) or not 0 < max_norm < LARGEST:
        raise OptimizerStateError(
            f"max_norm is {described(max_norm)}; expected a positive number, or None for no clipping."
        )
    return min(1.0, max_norm / (float(tree.norm(grads)) + 1e-6))


@public
def clip_gradient(
    ascent: Tree, max_norm: float | None = None, *, clip: float | None = None
) -> tuple[Tree, float, float]:
    """Make the gradient that the optimizer is given: g = c ∇L = −c J_Uᵀ(w A).

    Args:
        ascent: J_Uᵀ(w A) = −∇L, {name: [*shape]}.
        max_norm: as in `clip_factor`.
        clip: c itself, instead.

    Returns:
        (g, c, ‖∇L‖ before clipping).

    Raises:
        As `clip_factor`.

    Example:
        >>> import torch
        >>> clip_gradient({"w": torch.tensor([-3.0, -4.0])}, clip=0.5)
        ({'w': tensor([1.5000, 2.0000])}, 0.5, 5.0)
    """
    c, norm = clip_factor(ascent, max_norm) if clip is None else clip, float(tree.norm(ascent))
    if not math.isfinite(norm):
        raise NonFiniteError("The gradient is finite, and its norm is not: it is too large for its own dtype.")
    if not isinstance(c, int | float) or not 0 <= c * norm < LARGEST:
        raise OptimizerStateError(f"clip is {described(c)}; expected the factor that clips a gradient, such as 0.5.")
    return tree.scale(-c, ascent), c, norm
