"""Sums over sequences and norms of held gradients, without another pass over the model.

    weighted_sum     Jᵀw = Σ_n w_n g_n          no gradient is written out: for factors, one product over n and t
    squared_norms    ‖g_n‖², ⟨g_n, D g_n⟩       every gradient is written out once, a tile at a time
    squared_sum      Σ_n w_n g_n²               likewise; a square is not linear, so factors must be multiplied out

The last is each coordinate's share of a kernel's trace: trace(K) = Σ_n ⟨g_n, P g_n⟩ = Σ_α P_α Σ_n g_nα², P a diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from fkernel import tree
from fkernel.boundary import public
from fkernel.errors import NonFiniteError
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
    tensors,
)
from fkernel.func.handles.head import Head
from fkernel.func.handles.products import Products, ProductSpec, RowSpec, check_fit, device_of, rows_of, widest
from fkernel.func.handles.shards import tile_columns, tiles
from fkernel.func.inputs.validation import check_rows, check_weights
from fkernel.shapes import Tensor, Tree


@public
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


@public
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


@public
def squared_sum(handles: Handles, weights: Tensor | None = None) -> Tree:
    """Sum the squares of per-sequence gradients, coordinate by coordinate.

    Σ_n w_n g_nα²

    Args:
        handles: {name: [n, *shape]}, or handles of n sequences.
        weights: w, [n]; None for ones.

    Returns:
        {name: [*shape]} in the widest of the handles' dtypes, at least float32; units of the gradient, squared.

    Raises:
        TreeError: the handles are not all of one n.
        BatchError: there are no sequences, or not one weight for each.
        NonFiniteError: a weight, a gradient or a sum of squares is not finite.

    Example:
        >>> from fkernel.func import Factored
        >>> J = {"w": Factored(torch.tensor([[[1.0, 2.0]], [[0.0, 1.0]]]), torch.tensor([[[10.0]], [[1.0]]]))}
        >>> squared_sum(J)
        {'w': tensor([[100., 401.]])}
    """
    n, dtype = rows_of(handles, "handles"), widest(handles, handles)
    leaf = tensors(next(iter(handles.values())))[-1]
    w = torch.ones(n) if weights is None else weights
    check_weights(w, n)
    w = w.to(leaf.device, dtype)
    squares = {name: _squared(handle, w) for name, handle in handles.items()}
    for name, sums in squares.items():
        if not tree.all_finite(sums):
            check_rows({name: handle for name, handle in handles.items() if isinstance(handle, Tensor)})
            raise NonFiniteError(f"A gradient of {name!r} is not finite, or its square overflows.", parameter=name)
    return squares


def _squared(handle: Handle, w: Tensor) -> Tensor:
    if isinstance(handle, SparseRows):  # a batch uses few rows of a vocabulary of 150,000; the others are zero
        touched, ids = torch.unique(handle.ids, return_inverse=True)
        total = w.new_zeros(shape_of(handle))
        total[touched] = _by_tiles(SparseRows(ids.view_as(handle.ids), handle.cotangents, len(touched)), w)
        return total
    rows = handle[:, None] if isinstance(handle, Tensor) and handle.ndim == 1 else handle  # of a scalar parameter
    return _by_tiles(rows, w).view(shape_of(handle))


def _by_tiles(handle: Handle, w: Tensor) -> Tensor:
    shape = shape_of(handle)
    width = math.prod(shape[1:])
    step = max(1, tile_columns(count(handle), w.dtype.itemsize) // width)
    tile = tiles(handle, step, w.dtype)
    total = w.new_empty(shape[0], width)
    for start in range(0, shape[0], step):
        r = min(step, shape[0] - start)
        total[start : start + r] = (w @ tile(start, r).square()).view(r, width)
    return total.view(shape)
