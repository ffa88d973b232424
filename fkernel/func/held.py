"""What gradients that are held give without another pass over the model: Jᵀw, and norms.

weighted_sum     Jᵀw = Σ_n w_n g_n             no gradient is formed: of factors it is one product over n and t
squared_norms    ‖g_n‖², ⟨g_n, D g_n⟩          every gradient is formed once, a tile at a time
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from fkernel.errors import NonFiniteError
from fkernel.func.boundary import check_rows
from fkernel.func.contract import check_fit, rows_of, tile_columns, tiles, widest
from fkernel.func.handles import Factored, Handle, Handles, Rows, Stack, Sum, count, shape_of, tensors
from fkernel.shapes import Tensor, Tree


def weighted_sum(handles: Handles, weights: Tensor) -> Tree:
    """Compute Jᵀw of gradients that are held, without another backward pass and without forming any of them.

    Σ_n w_n g_n;  of factors, Σ_n w_n Σ_t δ_nt a_ntᵀ is one product over all n and t

    Args:
        handles: {name: handle} of n sequences.
        weights: w, [n].

    Returns:
        {name: [*shape]} in the weights' dtype; equals `vjp(f)(params, batch, weights)` where the handles are f's.

    Example:
        >>> J = {"w": Factored(torch.tensor([[[1.0, 2.0]], [[0.0, 1.0]]]), torch.tensor([[[10.0]], [[1.0]]]))}
        >>> weighted_sum(J, torch.tensor([1.0, 3.0]))
        {'w': tensor([[10., 23.]])}
    """
    return {name: _weighted(handle, weights) for name, handle in handles.items()}


def _weighted(handle: Handle, w: Tensor) -> Tensor:
    match handle:
        case Stack(parts):
            each = w.split([*map(count, parts)])
            return _added(_weighted(part, own) for part, own in zip(parts, each, strict=True))
        case Sum(parts):
            return _added(_weighted(part, w) for part in parts)
        case Factored(inputs, cotangents):
            return (cotangents.to(w) * w[:, None, None]).flatten(0, 1).mT @ inputs.to(w).flatten(0, 1)
        case Rows(ids, cotangents, size):
            moves = (cotangents.to(w) * w[:, None, None]).flatten(0, 1)
            return moves.new_zeros(size, moves.shape[-1]).index_add_(0, ids.flatten(), moves)
        case _:
            return torch.tensordot(w, handle.to(w), 1)


def _added(vectors: Iterator[Tensor]) -> Tensor:
    """Add up in the first one's storage, one beside it at a time."""
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
    """Compute ‖g‖² and ⟨g, D g⟩ of every sequence, forming every gradient once.

    Args:
        x: {name: [n, *shape]}, or handles.
        diagonal: D, {name: [*shape]}; None for ones.

    Raises:
        As `contract`.

    Example:
        >>> squared_norms({"w": torch.tensor([[3.0, 4.0]])}, diagonal={"w": torch.tensor([1.0, 0.5])})
        SquaredNorms(plain=tensor([25.], dtype=torch.float64), weighted=tensor([17.], dtype=torch.float64))
    """
    n, dtype = rows_of(x, "x"), widest(x, x)
    check_fit(x, x, diagonal)
    leaf = tensors(next(iter(x.values())))[0]
    plain, weighted = torch.zeros(2, n, dtype=torch.float64, device=leaf.device)
    for name, handle in x.items():
        D = torch.ones((), dtype=dtype) if diagonal is None else diagonal[name].to(dtype)
        shape = shape_of(handle)
        D = D.expand(shape).reshape(shape[0] if shape else 1, -1)
        rows = handle[:, None] if isinstance(handle, Tensor) and handle.ndim == 1 else handle
        step = max(1, tile_columns(n, dtype.itemsize) // D.shape[1])
        tile = tiles(rows, step, dtype)
        for start in range(0, len(D), step):
            squares = tile(start, min(step, len(D) - start)).square()
            plain += squares.sum(1, dtype=torch.float64)
            weighted += squares @ D[start : start + step].reshape(-1)
    _check_norms(plain, x)
    return SquaredNorms(plain, weighted)


def _check_norms(plain: Tensor, x: Handles) -> None:
    """Raise NonFiniteError where a norm is not finite; it names the row."""
    bad = (~torch.isfinite(plain)).nonzero()
    if len(bad):
        check_rows({name: handle for name, handle in x.items() if isinstance(handle, Tensor)})
        raise NonFiniteError("The gradient of row {row} is not finite, or its norm overflows.", row=int(bad[0]))
