"""Where parameters come from when a model runs a piece at a time: as they are, along a path, or from elsewhere.

    plain    θ                 half precision widened to float32
    moved    θ + s δ           made when it is asked for, of a table only the rows that are looked up

Any other is a `Source` too: a function of a name and, for tables, of the rows that are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from fkernel.shapes import Tensor, Tree

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Source:
    """Where parameters come from, a piece at a time, in the dtype that is computed in (float32, or float64).

    Attributes:
        leaf: (name, rows) -> the parameter, or some rows of it; None for all of them.
    """

    leaf: Callable[[str, slice | Tensor | None], Tensor]

    def __call__(self, names: Iterable[str]) -> Tree:
        """Make the parameters of these names."""
        return {name: self.leaf(name, None) for name in names}


def is_half(params: Tree) -> bool:
    """Tell whether a parameter is in half precision, so that it is cast when it is needed.

    Example:
        >>> is_half({"w": torch.ones(1, dtype=torch.bfloat16)})
        True
    """
    return any(leaf.dtype in HALF for leaf in params.values())


def widened(x: Tensor) -> Tensor:
    """Write half precision as float32; everything else stays itself.

    Example:
        >>> widened(torch.ones(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return x.float() if x.dtype in HALF else x


def plain(params: Tree) -> Source:
    """Take parameters as they are, half precision widened.

    Args:
        params: θ, {name: tensor}.

    Example:
        >>> plain({"w": torch.ones(2, dtype=torch.bfloat16)})(["w"])
        {'w': tensor([1., 1.])}
    """
    return Source(lambda name, rows: widened(params[name] if rows is None else params[name][rows]))


def moved(params: Tree, direction: Tree, s: float) -> Source:
    """Take parameters along a path, θ + s δ, made when they are asked for.

    Args:
        params: θ.
        direction: δ; what it does not name stays where it is.
        s: how far.

    Example:
        >>> moved({"w": torch.ones(2)}, {"w": torch.ones(2)}, 0.5)(["w"])
        {'w': tensor([1.5000, 1.5000])}
    """

    def leaf(name: str, rows: slice | Tensor | None) -> Tensor:
        θ = widened(params[name] if rows is None else params[name][rows])
        if name not in direction:
            return θ
        δ = direction[name] if rows is None else direction[name][rows]
        return θ + s * widened(δ).to(θ)

    return Source(leaf)
