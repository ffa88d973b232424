"""One side of a kernel: a batch in the order that the engine likes, cut into microbatches, and the gradients of each.

Whatever goes wrong with a sequence is told with the side's name and the row that the caller knows it by.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fkernel import tree
from fkernel.errors import BatchError, NonFiniteError
from fkernel.func.inputs import (
    Function,
    by_length,
    check_inputs,
    cut,
    is_half,
    lengths,
    own_width,
    take,
    translate_errors,
    trim,
    widths,
)
from fkernel.func.trust import certify_values
from fkernel.precond import Preconditioner
from fkernel.shapes import Tensor, Tree


class SortedBatch:
    """A batch, longest sequences first, without the padding that all of it shares; and the function it is for.

    Attributes:
        name: "E" or "U".
        batch: the ordered batch.
        order: [n], which row of the caller's batch each of its rows is.
        tokens: of each sequence.
        alike: what must be the same of sequences that share a microbatch; None where nothing need be.
        f: whose gradients are taken; None where they are read.
    """

    def __init__(self, name: str, batch: Any, f: Function | None = None) -> None:
        """Order a batch; f tells whether sequences of different lengths may share a microbatch."""
        self.f = f
        self.name, self.order = name, by_length(batch)
        moved = bool((self.order[1:] < self.order[:-1]).any())
        self.batch = trim(take(batch, self.order) if moved else batch)
        counts = lengths(self.batch)
        self.tokens = [1] * len(self.order) if counts is None else counts.tolist()
        self.alike = widths(self.batch) if f is not None and own_width(f) else None

    def __len__(self) -> int:
        """Count its sequences."""
        return len(self.order)


def blocks(side: SortedBatch, cuts: Sequence[slice], tokens: int | None) -> Iterator[list[int]]:
    """Gather successive microbatches into blocks of at most so many tokens; one that is larger goes alone."""
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


def cuts_of(side: SortedBatch, tokens: int | None) -> list[slice]:
    """Cut a side into microbatches."""
    return cut(side.tokens, tokens, side.alike)


def check_sides(
    f: Function, params: Tree, E: Any, U: Any, rows: Function | None = None, *, layers: bool = False
) -> None:
    """Check both batches before anything is computed from either, and say which one is at fault.

    `layers` says that the caller can go layer by layer, which takes weights in half precision.
    """
    sides = [("E", f if rows is None else rows, E), ("U", f, U)]
    if E is U and rows is None:
        sides = sides[1:]  # one batch is checked once, by the name that it was made for
    half = layers and is_half(params)
    for side, own, batch in sides:
        with error_context(side):
            check_inputs(own, params, batch, half and getattr(own, "tokens", None) is not None)
    for side, own, batch in sides if not half else ():  # what is cast layer by layer is certified when it is cut
        with error_context(side), translate_errors(params):
            certify_values(own, params, batch)


def check_side(side: str, f: Function, params: Tree, batch: Any) -> None:
    """Check one batch, and say whose it is."""
    with error_context(side), translate_errors(params):
        check_inputs(f, params, batch)
        certify_values(f, params, batch)


@contextmanager
def error_context(side: str, order: Tensor | None = None) -> Iterator[None]:
    """Say which batch an error belongs to, and name its row as the caller counts: row i here is row order[i] there."""
    try:
        yield
    except NonFiniteError as error:
        moved = 0 if error.row is None or order is None else int(order[error.row]) - error.row
        place = "" if error.row is None else f"In {side}, row {{row}} of the whole batch: "
        raise error.at(moved, place) from error
    except BatchError as error:
        raise BatchError(f"In {side}: {error}") from error


def transformed(precond: Preconditioner, x: Tree) -> Tree:
    """P x, where P may be anything that a caller wrote."""
    image = precond(x)
    tree.check_names(image, x, "the preconditioner's result", "the gradients")
    tree.check_finite(image, "the preconditioner's result")
    return image
