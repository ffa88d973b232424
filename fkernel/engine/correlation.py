"""Correlations, undefined (NaN) where numbers vary by no more than rounding."""

from __future__ import annotations

import torch

from fkernel import tree
from fkernel.boundary import public
from fkernel.errors import BatchError
from fkernel.shapes import Tensor

ROUNDING = 8
"""Spread of x, in roundoffs of its dtype relative to ‖x‖, that still counts as rounding."""


@public
def varies(x: Tensor) -> bool:
    """Return whether numbers differ by more than rounding.

    ‖x − x̄‖ > 8 u ‖x‖,  with u the roundoff of x's dtype; the mean of equal numbers is itself rounded

    Args:
        x: [n].

    Example:
        >>> varies(torch.full((3,), 0.1)), varies(torch.tensor([0.1, 0.2]))
        (False, True)
    """
    unit = torch.finfo(x.dtype if x.is_floating_point() else torch.float64).eps
    wide = x.double()
    return bool((wide - wide.mean()).norm() > ROUNDING * unit * wide.norm())


@public
def pearson(x: Tensor, y: Tensor) -> float:
    """Compute Pearson's r of two [n]; NaN where one does not vary. Spearman's is that of their `mean_ranks`.

    Example:
        >>> pearson(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0]))
        1.0
    """
    tree.check_finite({"x": x, "y": y}, "pearson")
    if x.shape != y.shape or x.ndim != 1 or not len(x):
        raise BatchError(f"x and y have shapes {list(x.shape)} and {list(y.shape)}; expected two [n] of one n.")
    if not (varies(x) and varies(y)):
        return float("nan")
    x, y = ((each.double() - each.double().mean()) for each in (x, y))
    return round(float((x / x.norm()) @ (y / y.norm())), 12)


@public
def mean_ranks(x: Tensor) -> Tensor:
    """Return ranks from 0, [n] float64; equal values share the mean of theirs, and all do where only rounding differs.

    Example:
        >>> mean_ranks(torch.tensor([3.0, 1.0, 3.0]))
        tensor([1.5000, 0.0000, 1.5000], dtype=torch.float64)
    """
    _, place, count = torch.unique(x if varies(x) else torch.zeros_like(x), return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count.double() + 1) / 2)[place]
