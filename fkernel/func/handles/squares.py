"""Σ_n w_n g_n² of held gradients: each coordinate's share of a kernel's trace.

    trace(K) = Σ_n ⟨g_n, P g_n⟩ = Σ_α P_α Σ_n g_nα²        for a diagonal P

`fkernel.func.handles.held.squared_norms` sums the same squares over coordinates, this over sequences. A square is not
linear, so factors must be multiplied out, a tile of columns at a time.
"""

from __future__ import annotations

import math

import torch

from fkernel import tree
from fkernel.errors import NonFiniteError
from fkernel.func.handles.forms import Handle, Handles, SparseRows, count, shape_of, tensors
from fkernel.func.handles.products import rows_of, widest
from fkernel.func.handles.shards import tile_columns, tiles
from fkernel.func.inputs.validation import check_rows, check_weights
from fkernel.shapes import Tensor, Tree


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
