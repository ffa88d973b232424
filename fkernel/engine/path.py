"""The path of a step: where E's gradients are evaluated, so that contributions add up to the realised change.

    S_e(θ+Δθ) − S_e(θ) = ∫₀¹ ⟨∇S_e(θ + sΔθ), Δθ⟩ ds ≈ Σ_j q_j ⟨∇S_e(θ + s_jΔθ), Δθ⟩

    start      s = 0                      the first order;           error ½ Δθᵀ H_e Δθ
    midpoint   s = ½                      one node as well;          error O(|Δθ|³), a 24th of the third derivative
    gauss2     s = ½ ∓ √3/6, q = ½        Gauss and Legendre's two;  error O(|Δθ|⁵)

Δθ is a sum of one part for every sequence of U, of momentum and of decay; so is each term, and the parts add up to the
left side, curvature included. Several nodes are contracted as one mean gradient, ḡ_e = Σ_j q_j ∇S_e(θ_j).

Source: path kernels, P. Domingos (2020) and B. Bell et al. (2023); M. Sundararajan et al., "Axiomatic attribution for
deep networks" (2017), for integrated gradients; C. F. Gauss (1814) for the nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fkernel import tree
from fkernel.boundary import public
from fkernel.errors import BatchError
from fkernel.func.handles import Concat, Factored, Handle, Handles, Piece, SparseRows, Sum, summands
from fkernel.shapes import Tensor, Tree

Path = Literal["midpoint", "start", "gauss2"]
_APART = 3**0.5 / 6
NODES: dict[str, tuple[tuple[float, float], ...]] = {
    "start": ((1.0, 0.0),),
    "midpoint": ((1.0, 0.5),),
    "gauss2": ((0.5, 0.5 - _APART), (0.5, 0.5 + _APART)),
}
"""{path: (q_j, s_j)}; weights add up to 1."""

Nodes = tuple[tuple[float, Tree], ...]
"""(q_j, θ_j)."""


def check_path(path: str) -> None:
    """Raise BatchError unless a path is one of `NODES`."""
    if path not in NODES:
        raise BatchError(f"path is {path!r}; expected 'midpoint' (the default), 'start' or 'gauss2'.")


@public
def nodes_of(path: str, params: Tree, step: Tree | None) -> Nodes:
    """Compute the nodes of a path.

    Args:
        path: of `NODES`.
        params: θ.
        step: Δθ; None for no step, with θ as the only node.

    Returns:
        (q_j, θ + s_jΔθ); where s is 0, θ itself.

    Example:
        >>> import torch
        >>> nodes_of("midpoint", {"w": torch.zeros(1)}, {"w": torch.ones(1)})
        ((1.0, {'w': tensor([0.5000])}),)
    """
    check_path(path)
    if step is None:
        return ((1.0, params),)
    return tuple((q, params if s == 0 else tree.axpy(s, step, params)) for q, s in NODES[path])


@public
def mean_of(pieces: Sequence[tuple[float, Handles]]) -> Handles:
    """Compute ḡ = Σ_j q_j g_j from one microbatch's handles at every node.

    Example:
        >>> import torch
        >>> mean_of([(0.5, {"w": torch.ones(1, 1)}), (0.5, {"w": torch.zeros(1, 1)})])
        {'w': tensor([[0.5000]])}
    """
    if len(pieces) == 1 and pieces[0][0] == 1.0:
        return pieces[0][1]
    return {name: _mean([(q, handles[name]) for q, handles in pieces]) for name in pieces[0][1]}


def _mean(pieces: list[tuple[float, Handle]]) -> Piece:
    parts = [_times(q, part) for q, handle in pieces if not isinstance(handle, Concat) for part in summands(handle)]
    dense = [part for part in parts if not isinstance(part, Factored | SparseRows)]
    others = [part for part in parts if isinstance(part, Factored | SparseRows)]
    whole = [sum(dense[1:], dense[0])] if dense else []
    # Lookups come last: they add to few rows of what the others have written whole.
    ordered = [*whole, *sorted(others, key=lambda part: isinstance(part, SparseRows))]
    return ordered[0] if len(ordered) == 1 else Sum(tuple(ordered))


def _times(q: float, part: Piece) -> Piece:
    if isinstance(part, Factored | SparseRows):
        return part._replace(cotangents=q * part.cotangents)
    assert isinstance(part, Tensor)  # heads and sums occur only layer by layer, where nodes are summed in `by_layer`
    return q * part
