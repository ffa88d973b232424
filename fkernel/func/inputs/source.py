"""Sources of parameters for models that run a layer at a time: as they are, along a path, or from elsewhere.

    plain    θ                 half precision widened to float32
    moved    θ + s δ           computed on demand, for a table only the rows that are looked up

Any other function of a name and, for tables, of rows can be a `Source` too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from fkernel.shapes import Tensor, Tree

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Source:
    """Gives parameters by name, in the dtype of the computation (float32 or float64).

    Attributes:
        leaf: (name, rows) -> the parameter, or some rows of it; None for all of them.
    """

    leaf: Callable[[str, slice | Tensor | None], Tensor]

    def __call__(self, names: Iterable[str]) -> Tree:
        """Return the parameters of these names."""
        return {name: self.leaf(name, None) for name in names}


def is_half(params: Tree) -> bool:
    """Return whether any parameter is in half precision.

    Example:
        >>> is_half({"w": torch.ones(1, dtype=torch.bfloat16)})
        True
    """
    return any(leaf.dtype in HALF for leaf in params.values())


def widened(x: Tensor) -> Tensor:
    """Cast half precision to float32; return everything else unchanged.

    Example:
        >>> widened(torch.ones(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return x.float() if x.dtype in HALF else x


def plain(params: Tree) -> Source:
    """Return a source of parameters as they are, half precision widened.

    Args:
        params: θ, {name: tensor}.

    Example:
        >>> plain({"w": torch.ones(2, dtype=torch.bfloat16)})(["w"])
        {'w': tensor([1., 1.])}
    """
    return Source(lambda name, rows: widened(params[name] if rows is None else params[name][rows]))


def moved(params: Tree, direction: Tree, s: float) -> Source:
    """Return a source of θ + s δ, computed on demand.

    Args:
        params: θ.
        direction: δ; parameters without an entry are unchanged.
        s: the scale.

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
