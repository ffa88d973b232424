"""⟨x_n, y_m⟩ over parameter space: the einsum that turns two sets of gradients into a kernel.

    K[n, m] = Σ_names Σ_α x[name][n, α] · D[name][α] · y[name][m, α]

Parameters are cut into shards of columns; each shard is one GEMM in at least float32, and shards are added up in
float64, so that the error does not grow with the number of parameters. Half-precision storage is widened a shard at a
time and never as a whole. A handle (`fkernel.func.handles`) is formed a shard at a time, in storage that is allocated
once; D is multiplied into the smaller side's shard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch

from fkernel import tree
from fkernel.errors import BatchError, NonFiniteError, TreeError
from fkernel.func.boundary import check_rows
from fkernel.func.handles import Handle, Handles, Rows, compressed, count, form, shape_of, tensors
from fkernel.shapes import Tensor, Tree

TILE_COLUMNS = 1 << 17
"""Columns of a formed shard, at most; with smaller ones forming is slower, with larger ones memory."""
LEAST_COLUMNS = 1 << 13
TILE_BYTES = 64 << 20
"""Storage for formed shards: many sequences get fewer columns."""


def tile_columns(rows: int, itemsize: int) -> int:
    """Columns of a shard that is formed for so many sequences."""
    return min(TILE_COLUMNS, max(LEAST_COLUMNS, TILE_BYTES // (itemsize * max(1, rows))))


def tile_bytes(rows: int, itemsize: int) -> int:
    """Bytes of the shards that are formed for so many sequences, both sides together."""
    return rows * itemsize * tile_columns(rows, itemsize)


def contract(x: Handles, y: Handles, *, diagonal: Tree | None = None, jit: bool | None = None) -> Tensor:
    """Compute all inner products between two sets of per-sequence gradients.

    K[n, m] = Σ_α x[n, α] D[α] y[m, α]

    Args:
        x: {name: [n, *shape]}, or handles of such gradients, in any mix.
        y: {name: [m, *shape]} or handles, the same names and shapes (not necessarily dtypes).
        diagonal: D, {name: [*shape]}; None for ones.
        jit: compile the shard's einsum with torch.compile. None compiles on an accelerator only: on a CPU a shard is
            one BLAS call already, and compiling costs seconds (`benchmarks/test_contract.py` measures both).

    Returns:
        [n, m] in the widest of the dtypes, at least float32.

    Raises:
        TreeError: names or shapes disagree.
        BatchError: one side has no rows.
        NonFiniteError: a row holds NaN or infinity; it names the row and the parameter.

    Example:
        >>> x = {"w": torch.tensor([[1.0, 0.0], [0.0, 2.0]])}
        >>> contract(x, {"w": torch.tensor([[3.0, 4.0]])})
        tensor([[3.],
                [8.]])
    """
    n, m = rows_of(x, "x"), rows_of(y, "y")
    check_fit(x, y, diagonal)
    leaf, dtype = tensors(next(iter(x.values())))[0], widest(x, y)
    shard = _compiled() if (leaf.device.type != "cpu" if jit is None else jit) else _einsum
    total = torch.zeros(n, m, dtype=torch.float64, device=leaf.device)
    for name in x:
        D = None if diagonal is None else diagonal[name]
        for left, right in _shards(x[name], y[name], D, dtype):
            total += shard(left, right)
    if not tree.all_finite(total):
        for side in (x, y):
            check_rows({name: handle for name, handle in side.items() if isinstance(handle, Tensor)})
        raise NonFiniteError("A product of finite gradients overflowed; contract in float64 (fkernel.tree.cast).")
    return total.to(dtype)


def _shards(x: Handle, y: Handle, D: Tensor | None, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Walk one parameter in shards [n p], [m p] whose products add up to ⟨x, D y⟩."""
    same = x is y
    if isinstance(x, Rows) and isinstance(y, Rows):
        x, y, D = compressed(x, y, D)
    if isinstance(x, Tensor) and isinstance(y, Tensor):  # no structure to follow
        x, y = x.flatten(1) if x.ndim > 1 else x[:, None], y.flatten(1) if y.ndim > 1 else y[:, None]
        D = None if D is None else D.reshape(-1)
    shape, n, m = shape_of(x), count(x), count(y)
    width = math.prod(shape[1:])
    step = max(1, tile_columns(n + m, dtype.itemsize) // width)
    tile_x, tile_y = tiles(x, step, dtype), tiles(y, step, dtype)
    room: Tensor | None = None
    for start in range(0, shape[0], step):
        r = min(step, shape[0] - start)
        left = tile_x(start, r)
        right = left if same else tile_y(start, r)
        if D is not None:
            d = D[start : start + r].reshape(1, -1)
            # D is multiplied into a shard that was formed here, the smaller one, and never into what a caller holds.
            if not isinstance(x, Tensor) and not same and (n <= m or isinstance(y, Tensor)):
                left.mul_(d)
            elif not isinstance(y, Tensor) and not same:
                right.mul_(d)
            else:
                room = left.new_empty(m * min(step, shape[0]), width) if room is None else room
                right = torch.mul(right, d, out=room[: m * r].view(m, r * width))
        yield left, right


def tiles(x: Handle, step: int, dtype: torch.dtype) -> Callable[[int, int], Tensor]:
    """Make (start, r) -> [n, r·width], rows start … start + r of the leading dimension; dense ones are not copied."""
    shape, n = shape_of(x), count(x)
    width = math.prod(shape[1:])
    if isinstance(x, Tensor) and x.dtype == dtype:
        flat = x.flatten(1)
        return lambda start, r: flat[:, start * width : (start + r) * width]
    room = tensors(x)[-1].new_empty(n * min(step, shape[0]), width, dtype=dtype)

    def formed(start: int, r: int) -> Tensor:
        out = room[: n * r].view(n, r, *shape[1:])
        form(x, out, start)
        return out.view(n, -1)

    return formed


_einsum: Callable[[Tensor, Tensor], Tensor] = partial(torch.einsum, "np,mp->nm")
"""One shard, [n p], [m p] -> [n m]."""


@cache
def _compiled() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(lambda left, right: _einsum(left, right), dynamic=True)


def widest(x: Handles, y: Handles) -> torch.dtype:
    """Tell the dtype that products of two sides are computed in: the widest, at least float32."""
    dtype = torch.float32
    for leaf in (leaf for side in (x, y) for handle in side.values() for leaf in tensors(handle)):
        if leaf.is_floating_point():
            dtype = torch.promote_types(dtype, leaf.dtype)
    return dtype


def rows_of(x: Handles, side: str) -> int:
    """Count the sequences of a side, or raise TreeError or BatchError where there is no one number, or none."""
    scalars = [name for name, handle in x.items() if isinstance(handle, Tensor) and handle.ndim == 0]
    counts = {-1} if scalars else {count(handle) for handle in x.values()}
    if len(counts) != 1 or -1 in counts:
        raise TreeError(f"{side} must hold per-sequence gradients {{name: [n, *shape]}} of one n; found n in {counts}.")
    (n,) = counts
    if n == 0:
        raise BatchError(f"{side} holds no rows; a kernel needs at least one sequence on each side.")
    return n


def check_fit(x: Handles, y: Handles, diagonal: Tree | None) -> None:
    """Raise TreeError unless both sides and the diagonal are about the same parameters, shapes included."""
    tree.check_names(y, x, "y", "x")
    if diagonal is not None:
        tree.check_names(x, diagonal, "the tree to precondition", "the preconditioner")
    for name in x:
        left, right = list(shape_of(x[name])), list(shape_of(y[name]))
        if left != right:
            raise TreeError(f"x[{name!r}] has rows of shape {left}, y[{name!r}] of {right}.")
        if diagonal is not None and list(diagonal[name].shape) != left:
            raise TreeError(
                f"The tree's {name!r} has shape {left} a row; the preconditioner's has {list(diagonal[name].shape)}."
            )
