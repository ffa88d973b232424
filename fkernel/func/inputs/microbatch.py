"""Microbatching as wrappers around functions.

A function of (params, batch, …) whose result has one row a sequence is stacked over microbatches; one whose result is
a sum over sequences is summed. Either way the value is the same for every microbatch size.

Sequences differ in length, and padding costs as much as tokens. So a microbatch of size m has at most m times the
longest sequence's tokens: sequences are sorted by length, shorter ones share larger microbatches, and each microbatch
is trimmed to its longest sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fkernel.errors import BatchError
from fkernel.func.inputs.batch import by_length, find_sequences, length, lengths, take, token_counts, trim, widths
from fkernel.shapes import Tensor, Tree

STARTING = 256
"""Fixed cost of a microbatch, in tokens (128 to 256 for models of 1M to 14M parameters)."""


def slices(n: int, size: int | None) -> Iterator[slice]:
    """Cut n rows into slices of at most `size` (None: all at once).

    Raises:
        BatchError: size is not a positive whole number.

    Example:
        >>> [*slices(5, 2)]
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    check_size(size)
    step = size or n
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def check_size(size: int | None) -> None:
    """Raise BatchError unless a microbatch's size is a positive whole number, or None."""
    if size is not None and (not isinstance(size, int) or size < 1):
        raise BatchError(f"microbatch is {size!r}; expected a positive whole number of sequences, or None for all.")


def token_grant(batch: Any, size: int | None) -> int | None:
    """Convert a microbatch of `size` sequences to tokens: `size` times the longest sequence's.

    In a batch without `Sequences` every row counts as one token.
    """
    check_size(size)
    counts = lengths(batch)
    return None if size is None else size * (1 if counts is None else int(counts.max()))


def groups(batch: Any, tokens: int | None, own_width: bool = False) -> list[slice]:
    """Cut a batch, in its order, into microbatches of at most `tokens` tokens, padding included; see `cut`.

    Args:
        batch: the batch.
        tokens: of a microbatch, at most; None for no limit.
        own_width: whether only sequences of one length may share a microbatch, which then has no padding.
    """
    return cut(token_counts(batch), tokens, widths(batch) if own_width else None)


def cut(counts: Sequence[int], tokens: int | None, alike: Sequence[Hashable] | None = None) -> list[slice]:
    """Cut sequences with the given token counts, in their order, at least cost.

    A microbatch costs the tokens of its longest sequence, for each of its sequences, plus `STARTING`. The
    cheapest cut of the sequences from i on is the cheapest first microbatch i … j and the cheapest cut from j on:

        cost(i) = min over j of  STARTING + (j − i) · max(counts[i:j]) + cost(j)

    Ties prefer larger first microbatches. A sequence longer than `tokens` is a microbatch by itself. Where `alike` is
    given, only sequences with equal entries share a microbatch.

    Example:
        >>> cut([8, 4, 3], 8)
        [slice(0, 1, None), slice(1, 3, None)]
        >>> cut([500, 500, 500, 50, 50], 2000)  # four would fit, and half of the fourth would be padding
        [slice(0, 3, None), slice(3, 5, None)]
    """
    if tokens is None and alike is None:
        return [slice(0, len(counts))]
    n = len(counts)
    cost, stop = [0] * (n + 1), [n] * (n + 1)
    for i in range(n - 1, -1, -1):
        widest, least = 0, -1
        for j in range(i + 1, n + 1):
            widest = max(widest, counts[j - 1])
            padded = (j - i) * widest
            if j > i + 1 and tokens is not None and padded > tokens:
                break
            if alike is not None and alike[j - 1] != alike[i]:
                break
            if least < 0 or STARTING + padded + cost[j] <= least:
                least, stop[i] = STARTING + padded + cost[j], j
        cost[i] = least
    rows, start = [], 0
    while start < n:
        rows.append(slice(start, stop[start]))
        start = stop[start]
    return rows


def microbatches(batch: Any, size: int | None, own_width: bool = False) -> Iterator[tuple[slice | Tensor, Any]]:
    """Iterate over trimmed microbatches, longest sequences first: (their rows in the batch, the microbatch)."""
    order = by_length(batch)
    as_it_came = bool((order[1:] > order[:-1]).all())
    ordered = batch if as_it_came else take(batch, order)
    for rows in groups(ordered, token_grant(batch, size), own_width):
        yield rows if as_it_came else order[rows], trim(take(ordered, rows))


def stacked(fn: Callable[..., Any], size: int | None, own_width: bool = False) -> Callable[..., Any]:
    """Wrap fn(params, batch, *rest) -> tensors with one row a sequence, to run on `size` sequences at a time.

    Several values a sequence may belong to tokens, so microbatches are then not trimmed to their longest sequence. This
    is decided by the first microbatch, whose values are kept.
    """

    def over_microbatches(params: Tree, batch: Any, *rest: Any) -> Any:
        order: list[Tensor] = []
        done: list[list[Tensor]] = []
        columns, spec = _columns(batch), None
        for rows, part in microbatches(batch, size, own_width):
            leaves, spec = pytree.tree_flatten(fn(params, part, *rest))
            places = torch.arange(length(batch))[rows]
            if not own_width and any(leaf.ndim > 1 for leaf in leaves):
                # These values are complete unless columns of padding were trimmed.
                known = (places, leaves) if _columns(part) == columns else None
                order, done = _uncut(fn, params, batch, size, rest, known)
                break
            order.append(places)
            done.append([_widened(leaf, max(columns, default=0)) for leaf in leaves] if own_width else leaves)
        assert spec is not None
        back = torch.cat(order).argsort()
        return pytree.tree_unflatten([torch.cat(column)[back] for column in zip(*done, strict=True)], spec)

    return over_microbatches


def _uncut(
    fn: Callable[..., Any],
    params: Tree,
    batch: Any,
    size: int | None,
    rest: tuple[Any, ...],
    known: tuple[Tensor, list[Tensor]] | None,
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Compute untrimmed rows, `size` at a time: (their positions, their values), starting from known ones."""
    order, done = ([], []) if known is None else ([known[0]], [known[1]])
    left = torch.ones(length(batch), dtype=torch.bool)
    for places in order:
        left[places] = False
    for places in left.nonzero()[:, 0].split(size or length(batch)):
        if len(places):
            order.append(places)
            done.append(pytree.tree_leaves(fn(params, take(batch, places), *rest)))
    return order, done


def _columns(batch: Any) -> list[int]:
    """Return the width of every `Sequences` in a batch."""
    return [one.input_ids.shape[1] for one in find_sequences(batch)]


def _widened(leaf: Tensor, columns: int) -> Tensor:
    """Pad values of tokens with 0, for columns of padding that a microbatch of one length does not have."""
    return F.pad(leaf, (0, columns - leaf.shape[1])) if leaf.ndim == 2 else leaf


def summed(
    fn: Callable[[Tree, Any, Tensor], tuple[Tree, Tensor]], size: int | None, own_width: bool = False
) -> Callable[[Tree, Any, Tensor], tuple[Tree, Tensor]]:
    """Wrap fn(params, batch, weights) -> (a sum over sequences, rows) to run on `size` at a time."""

    def over_microbatches(params: Tree, batch: Any, weights: Tensor) -> tuple[Tree, Tensor]:
        total: Tree = {}
        values: Tensor | None = None
        for rows, part in microbatches(batch, size, own_width):
            g, value = fn(params, part, weights[rows])
            values = value.new_empty(length(batch)) if values is None else values
            values[rows] = value
            total = {name: total[name].add_(g[name]) if total else g[name] for name in g}
        assert values is not None
        return total, values

    return over_microbatches
