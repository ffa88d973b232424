"""⟨x_n, y_m⟩ over parameter space: the einsum that turns two sets of gradients into a kernel.

    K[n, m] = Σ_names Σ_α x[name][n, α] · y[name][m, α]

Parameters are cut into shards of columns; each shard is one GEMM in at least float32, and shards are added up in
float64, so that the error does not grow with the number of parameters. Half-precision storage is widened a shard at a
time and never as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch

from fkernel import tree
from fkernel.errors import BatchError, NonFiniteError, TreeError
from fkernel.func.boundary import check_rows
from fkernel.shapes import Shaped, Tensor, Tree


def contract(x: Tree, y: Tree, *, jit: bool | None = None) -> Tensor:
    """Compute all inner products between two sets of per-sequence gradients.

    K[n, m] = Σ_α x[n, α] y[m, α]

    Args:
        x: {name: [n, *shape]}.
        y: {name: [m, *shape]}, the same names and shapes (not necessarily dtypes).
        jit: compile the shard's einsum with torch.compile. None compiles on an accelerator only: on a CPU a shard is
            one BLAS call already, and compiling costs seconds (`benchmarks/test_contract.py` measures both).

    Returns:
        [n, m] in the wider of both dtypes, at least float32.

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
    n, m = _rows(x, "x"), _rows(y, "y")
    _check_fit(x, y)
    leaf, other = next(iter(x.values())), next(iter(y.values()))
    dtype = torch.promote_types(torch.promote_types(leaf.dtype, other.dtype), torch.float32)
    shard = _compiled() if (leaf.device.type != "cpu" if jit is None else jit) else _einsum
    total = torch.zeros(n, m, dtype=torch.float64, device=leaf.device)
    for _, left, right in tree.shards(x, y):
        total += shard(left.to(dtype), right.to(dtype))
    if not tree.all_finite(total):
        check_rows(x)
        check_rows(y)
        raise NonFiniteError("A product of finite gradients overflowed; contract in float64 (fkernel.tree.cast).")
    return total.to(dtype)


_einsum: Callable[[Tensor, Tensor], Tensor] = partial(torch.einsum, "np,mp->nm")
"""One shard, [n p], [m p] -> [n m]."""


@cache
def _compiled() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(lambda left, right: _einsum(left, right), dynamic=True)


def _rows(x: Tree, side: str) -> int:
    counts = {leaf.shape[0] if leaf.ndim else -1 for leaf in x.values()}
    if len(counts) != 1 or -1 in counts:
        raise TreeError(f"{side} must hold per-sequence gradients {{name: [n, *shape]}} of one n; found n in {counts}.")
    (n,) = counts
    if n == 0:
        raise BatchError(f"{side} holds no rows; a kernel needs at least one sequence on each side.")
    return n


def _check_fit(x: Tree, y: Tree) -> None:
    tree.check_names(y, x, "y", "x")
    for name in x:
        left: Shaped[Tensor, "n ..."] = x[name]
        right: Shaped[Tensor, "m ..."] = y[name]
        if left.shape[1:] != right.shape[1:]:
            raise TreeError(
                f"x[{name!r}] has rows of shape {list(left.shape[1:])}, y[{name!r}] of {list(right.shape[1:])}."
            )
