"""Memory as a wrapper around a function, never an argument of the mathematics.

A function of (params, batch, …) whose result has one row a sequence is stacked over microbatches; one whose result is
a sum over sequences is summed. Either way the value is the same for every microbatch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fkernel.errors import BatchError
from fkernel.func.batch import length, take
from fkernel.func.storage import empty_rows
from fkernel.shapes import Tensor, Tree


def slices(n: int, size: int | None) -> Iterator[slice]:
    """Cut n rows into microbatches of at most `size` (None: all at once).

    Raises:
        BatchError: size is not a positive whole number.

    Example:
        >>> [*slices(5, 2)]
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    if size is not None and (not isinstance(size, int) or size < 1):
        raise BatchError(f"microbatch is {size!r}; expected a positive whole number of sequences, or None for all.")
    step = size or n
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def stacked(fn: Callable[..., Any], size: int | None) -> Callable[..., Any]:
    """Wrap fn(params, batch, *rest) -> rows so that it sees `size` sequences at a time.

    The result (a tensor or a tree, every leaf with n rows) is filled into storage that is allocated once.
    """

    def over_microbatches(params: Tree, batch: Any, *rest: Any) -> Any:
        n = length(batch)
        if size is None or size >= n:
            return fn(params, batch, *rest)
        out: list[Any] = []
        spec = None
        for rows in slices(n, size):
            parts, spec = pytree.tree_flatten(fn(params, take(batch, rows), *rest))
            if not out:
                out = [empty_rows(n, part[0]) if isinstance(part, Tensor) else part for part in parts]
            for whole, part in zip(out, parts, strict=True):
                if isinstance(part, Tensor):
                    whole[rows] = part
        assert spec is not None
        return pytree.tree_unflatten(out, spec)

    return over_microbatches


def summed(
    fn: Callable[[Tree, Any, Tensor], tuple[Tree, Tensor]], size: int | None
) -> Callable[[Tree, Any, Tensor], tuple[Tree, Tensor]]:
    """Wrap fn(params, batch, weights) -> (a sum over sequences, rows) so that it sees `size` sequences at a time."""

    def over_microbatches(params: Tree, batch: Any, weights: Tensor) -> tuple[Tree, Tensor]:
        total: Tree = {}
        values: list[Tensor] = []
        for rows in slices(length(batch), size):
            part, value = fn(params, take(batch, rows), weights[rows])
            total = {name: total[name].add_(part[name]) if total else part[name] for name in part}
            values.append(value)
        return total, torch.cat(values)

    return over_microbatches
