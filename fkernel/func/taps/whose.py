"""Assignment of an operation's rows to the sequences of a batch.

    sequences outermost       row r of n·k belongs to sequence ⌊r/k⌋
    gathered, x[i_1 … i_R]    row r belongs to the sequence of row i_r of x
    split, concatenated       rows keep their sequences
    other operations          with as many rows: the same; with another number: sequences are outermost again

A router sends the tokens of all sequences to the experts, so an expert's rows are gathered from all sequences, in any
number. Only tensors with a gradient are followed, in the order in which f runs. The assignment is verified: a cotangent
of one of two sequences must not reach a row of the other, see `fkernel.func.taps.batched`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from fkernel.errors import ModelError
from fkernel.shapes import Tensor


class Whose:
    """The sequences of gathered rows, propagated from operation to operation.

    Attributes:
        n: sequences.
    """

    def __init__(self, n: int) -> None:
        """Start with sequences outermost everywhere."""
        self.n = n
        self._known = WeakTensorKeyDictionary()  # does not keep activations alive

    def of(self, args: Any, rows: int) -> Tensor | None:
        """Return the sequence of each row of an operation, [rows]; None where sequences are outermost.

        Args:
            args: the operation's arguments, nested or not.
            rows: the leading dimension of its result.

        Raises:
            ModelError: rows of several sequences are combined.
        """
        if not len(self._known):
            return None
        owners: Tensor | None = None
        for leaf in pytree.tree_leaves(args):
            own = self._known.get(leaf) if isinstance(leaf, Tensor) else None
            if own is None or len(own) != rows:
                continue
            if owners is not None and owners is not own and not torch.equal(owners, own):
                raise ModelError("Rows that were gathered from different sequences are combined.")
            owners = own
        return owners

    def follow(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        """Propagate ownership through an operation that has run."""
        if not len(self._known) and func not in _CHOICES:
            return  # fast path: every operation calls this
        if any(out is arg for arg in args[:1]) or getattr(func, "__name__", "").startswith(_SCATTERED):
            return  # rows are written to other sequences' positions
        parts = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        owners = self._moved(func, args, kwargs, parts)
        for k, leaf in enumerate(parts):
            if leaf.requires_grad and leaf.ndim:
                self.note(leaf, self.of((args, kwargs), len(leaf)) if owners is None else owners[k])

    def note(self, out: Tensor, owners: Tensor | None) -> None:
        """Record the sequence of each row of a tensor."""
        if owners is not None:
            self._known[out] = owners

    def _moved(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: list[Tensor]) -> list[Tensor] | None:
        """Return the owners of rows that an operation has indexed, split or concatenated."""
        x = args[0] if args else None
        if func is torch.Tensor.__getitem__:
            return self._chosen(args[0], args[1])
        if func in _CHOICES and len(args) == 3 and args[1] == 0:
            return self._chosen(args[0], args[2])
        if not len(self._known):
            return None
        if func is torch.cat and not (kwargs.get("dim", 0) or any(args[1:])):
            owners = [self._known.get(leaf) for leaf in args[0]]
            return None if any(own is None for own in owners) else [torch.cat(owners)]  # pyright: ignore
        own = self._known.get(x) if isinstance(x, Tensor) else None
        if own is None or len(out) < 2 or not all(leaf.ndim for leaf in out) or sum(map(len, out)) != len(own):
            return None
        return [*own.split([len(leaf) for leaf in out])]

    def _chosen(self, x: Tensor, ids: Any) -> list[Tensor] | None:
        ids = ids[0] if isinstance(ids, tuple) and ids else ids
        own = self._known.get(x)
        if own is not None and isinstance(ids, slice):
            return [own[ids]]
        if not (isinstance(ids, Tensor) and ids.ndim == 1 and ids.dtype == torch.int64 and x.ndim > 1):
            return None
        if own is not None:
            return [own[ids]]
        return None if len(x) % self.n else [ids % len(x) // (len(x) // self.n)]


_CHOICES = (torch.Tensor.__getitem__, torch.index_select, torch.Tensor.index_select)
_SCATTERED = ("index_add", "index_put", "index_copy", "scatter")


def by_sequence(x: Tensor, n: int, owners: Tensor | None = None, fill: float = 0.0) -> Tensor:
    """Reshape rows [n·k, …] to [n, k, …]; gathered ones in order, padded to the largest number of any sequence.

    Args:
        x: rows.
        n: sequences.
        owners: the sequence of each row; None where sequences are outermost.
        fill: the padding value.

    Example:
        >>> by_sequence(torch.tensor([1.0, 2.0, 3.0]), 2, torch.tensor([1, 0, 1])).tolist()
        [[2.0, 0.0], [1.0, 3.0]]
    """
    if owners is None:
        return x.unflatten(0, (n, -1)) if len(x) else x.new_zeros(n, 0, *x.shape[1:])
    counts = torch.bincount(owners, minlength=n)
    order = torch.argsort(owners, stable=True)
    mine = owners[order]
    place = torch.arange(len(owners), device=owners.device) - (counts.cumsum(0) - counts)[mine]
    out = x.new_full((n, int(counts.max()), *x.shape[1:]), fill)
    out[mine, place] = x[order]
    return out
