"""Jᵀw and norms of held gradients, without another pass over the model.

weighted_sum     Jᵀw = Σ_n w_n g_n             no gradient is written out: for factors, one product over n and t
squared_norms    ‖g_n‖², ⟨g_n, D g_n⟩          every gradient is written out once, a tile at a time
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from fkernel.func.handles.forms import (
    Concat,
    Factored,
    Handle,
    Handles,
    SparseRows,
    Sum,
    count,
    materialize_into,
    shape_of,
)
from fkernel.func.handles.head import Head
from fkernel.func.handles.products import Products, ProductSpec, RowSpec, check_fit, device_of, rows_of
from fkernel.func.handles.shards import tile_columns
from fkernel.shapes import Tensor, Tree


def weighted_sum(handles: Handles, weights: Tensor) -> Tree:
    """Compute Jᵀw of held gradients, without another backward pass and without writing them out.

    Σ_n w_n g_n;  for factors, Σ_n w_n Σ_t δ_nt a_ntᵀ is one product over all n and t

    Args:
        handles: {name: handle} of n sequences.
        weights: w, [n].

    Returns:
        {name: [*shape]} in the weights' dtype; equals `vjp(f)(params, batch, weights)` for handles of f.

    Example:
        >>> J = {"w": Factored(torch.tensor([[[1.0, 2.0]], [[0.0, 1.0]]]), torch.tensor([[[10.0]], [[1.0]]]))}
        >>> weighted_sum(J, torch.tensor([1.0, 3.0]))
        {'w': tensor([[10., 23.]])}
    """
    return {name: _weighted(handle, weights) for name, handle in handles.items()}


def _weighted(handle: Handle, w: Tensor) -> Tensor:
    match handle:
        case Concat(parts):
            each = w.split([*map(count, parts)])
            return _added(_weighted(part, own) for part, own in zip(parts, each, strict=True))
        case Sum(parts):
            return _added(_weighted(part, w) for part in parts)
        case Factored(inputs, cotangents):
            return (cotangents.to(w) * w[:, None, None]).flatten(0, 1).mT @ inputs.to(w).flatten(0, 1)
        case SparseRows(ids, cotangents, size):
            moves = (cotangents.to(w) * w.view(-1, *[1] * (cotangents.ndim - 1))).flatten(0, 1)
            return moves.new_zeros(size, *moves.shape[1:]).index_add_(0, ids.flatten(), moves)
        case Head():
            # The weighted positions of all sequences form one sequence, written out a range of rows at a time.
            x, ω = handle.x.to(w), handle.omega * w[:, None]
            η = None if handle.eta is None else handle.eta * w[:, None]
            one = handle._replace(x=x, omega=ω, eta=η).changed(lambda leaf: leaf.flatten(0, 1)[None])
            out, step = x.new_empty(1, *shape_of(handle)), max(1, tile_columns(1, x.element_size()) // x.shape[-1])
            for start in range(0, handle.size, step):
                materialize_into(one, out[:, start : start + step], start)
            return out[0]
        case _:
            return torch.tensordot(w, handle.to(w), 1)


def _added(vectors: Iterator[Tensor]) -> Tensor:
    """Sum in the first one's storage, with one other in memory at a time."""
    total = next(vectors)
    for vector in vectors:
        total += vector
    return total


class SquaredNorms(NamedTuple):
    """Of per-sequence gradients, [n] float64 each.

    Attributes:
        plain: ‖g‖².
        weighted: ⟨g, D g⟩, the diagonal of the kernel.
    """

    plain: Tensor
    weighted: Tensor


def squared_norms(x: Handles, *, diagonal: Tree | None = None) -> SquaredNorms:
    """Compute ‖g‖² and ⟨g, D g⟩ of every sequence, writing every gradient out once.

    Args:
        x: {name: [n, *shape]}, or handles.
        diagonal: D, {name: [*shape]}; None for ones.

    Raises:
        As `contract`.

    Example:
        >>> squared_norms({"w": torch.tensor([[3.0, 4.0]])}, diagonal={"w": torch.tensor([1.0, 0.5])})
        SquaredNorms(plain=tensor([25.], dtype=torch.float64), weighted=tensor([17.], dtype=torch.float64))
    """
    check_fit(x, x, diagonal)
    products = Products(
        ProductSpec(x=RowSpec(squares={"plain": None, "weighted": diagonal})), rows_of(x, "x"), 0, device_of(x)
    )
    products.add(x, x, own_y=False)
    return SquaredNorms(products.whole("x", "plain"), products.whole("x", "weighted"))
