"""One batch of a kernel, E or U, sorted by length and cut into microbatches.

Errors about a sequence name the batch and the sequence's row in the caller's order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch

from fkernel import tree
from fkernel.boundary import public
from fkernel.distributed import ShardedTree
from fkernel.errors import BatchError, NonFiniteError
from fkernel.func.inputs import (
    Function,
    by_length,
    check_inputs,
    cut,
    is_half,
    own_width,
    take,
    token_counts,
    translate_errors,
    trim,
    widths,
)
from fkernel.func.trust import certify_values
from fkernel.precond import Preconditioner
from fkernel.shapes import Tensor, Tree


class SortedBatch:
    """A batch, longest sequences first, without padding that all sequences share; and its function f.

    Attributes:
        name: "E" or "U".
        batch: the ordered batch.
        order: [n], the row of the caller's batch that each row came from.
        tokens: of each sequence, their number.
        alike: widths that must be equal within a microbatch; None where any may share one.
        f: the function to differentiate; None where gradients are only read.
    """

    def __init__(self, name: str, batch: Any, f: Function | None = None) -> None:
        """Sort a batch; f decides whether sequences of different lengths may share a microbatch."""
        self.f = f
        self.name, self.order = name, by_length(batch)
        moved = bool((self.order[1:] < self.order[:-1]).any())
        self.batch = trim(take(batch, self.order) if moved else batch)
        self.tokens = token_counts(self.batch)
        self.alike = widths(self.batch) if f is not None and own_width(f) else None

    def __len__(self) -> int:
        """Count its sequences."""
        return len(self.order)

    def every(self, step: int, start: int) -> SortedBatch:
        """Return every `step`-th sequence from `start` on, which may be none; `order` counts the caller's rows."""
        part, rows = copy(self), torch.arange(len(self), device=self.order.device)[start::step]
        part.order, part.tokens = self.order[rows], self.tokens[start::step]
        part.batch = trim(take(self.batch, rows)) if len(rows) else None
        part.alike = None if self.alike is None else self.alike[start::step]
        return part


def blocks(side: SortedBatch, cuts: Sequence[slice], tokens: int | None) -> Iterator[list[int]]:
    """Group successive microbatches into blocks of at most `tokens`; a larger one is a block by itself."""
    block: list[int] = []
    held = 0
    for i, rows in enumerate(cuts):
        size = (rows.stop - rows.start) * side.tokens[rows.start]
        if block and tokens is not None and held + size > tokens:
            yield block
            block, held = [], 0
        block.append(i)
        held += size
    yield block


@public
def cuts_of(side: SortedBatch, tokens: int | None) -> list[slice]:
    """Cut a sorted batch into microbatches of at most so many tokens; None for one microbatch.

    Example:
        >>> cuts_of(SortedBatch("U", torch.ones(3, 2)), 2)
        [slice(0, 2, None), slice(2, 3, None)]
    """
    return cut(side.tokens, tokens, side.alike)


def check_sides(
    f: Function, params: Tree, E: Any, U: Any, rows: Function | None = None, *, layers: bool = False
) -> None:
    """Validate both batches before any computation; errors name the batch.

    `layers`: the caller can compute layer by layer, which accepts weights in half precision.
    """
    sides = [("E", f if rows is None else rows, E), ("U", f, U)]
    if E is U and rows is None:
        sides = sides[1:]  # one batch is checked once, as U
    half = layers and is_half(params)
    in_shards = isinstance(params, ShardedTree)
    for side, own, batch in sides:
        with error_context(side):
            check_inputs(own, params, batch, half and getattr(own, "tokens", None) is not None)
    # Half precision, and what is in shards, is certified when the model is cut.
    for side, own, batch in sides if not (half or in_shards) else ():
        with error_context(side), translate_errors(params):
            certify_values(own, params, batch)


@public
def check_side(side: str, f: Function, params: Tree, batch: Any) -> None:
    """Validate one batch; errors name it.

    Example:
        >>> check_side("E", lambda params, x: x @ params["w"], {"w": torch.ones(2)}, torch.ones(3, 2))
        >>> check_side("E", lambda params, x: x @ params["w"], {"w": torch.ones(2)}, torch.ones(0, 2))
        Traceback (most recent call last):
        fkernel.errors.BatchError: In E: ...
    """
    with error_context(side), translate_errors(params):
        check_inputs(f, params, batch)
        certify_values(f, params, batch)


@contextmanager
def error_context(side: str, order: Tensor | None = None) -> Iterator[None]:
    """Add the batch's name to errors, and translate row i to the caller's row order[i]."""
    try:
        yield
    except NonFiniteError as error:
        moved = 0 if error.row is None or order is None else int(order[error.row]) - error.row
        place = "" if error.row is None else f"In {side}, row {{row}} of the whole batch: "
        raise error.at(moved, place) from error
    except BatchError as error:
        raise BatchError(f"In {side}: {error}") from error


def transformed(precond: Preconditioner, x: Tree) -> Tree:
    """Apply P to x, and check the names and values of the result."""
    image = precond(x)
    tree.check_names(image, x, "the preconditioner's result", "the gradients")
    tree.check_finite(image, "the preconditioner's result")
    return image
