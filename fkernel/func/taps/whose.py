"""Whose row it is: how the rows of an operation belong to the sequences of a batch.

    sequences outermost       row r of n·k belongs to sequence ⌊r/k⌋
    gathered, x[i_1 … i_R]    row r belongs to whoever row i_r of x belongs to
    split, joined             each part keeps its own
    anything else on these    of as many rows: to the same; of another number: sequences are outermost again

A router sends the tokens of all sequences to the experts, so that an expert's rows are gathered from everywhere and
their number is anyone's guess. Only what carries a gradient is followed, in the order in which f runs. Like the layout
of any other operation this is not taken on trust: what comes back to one of two sequences must not reach a row of the
other, see `fkernel.func.taps.batched`.
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
    """The sequences that gathered rows belong to, followed from operation to operation.

    Attributes:
        n: sequences.
    """

    def __init__(self, n: int) -> None:
        """Start with sequences outermost everywhere."""
        self.n = n
        self._known = WeakTensorKeyDictionary()  # an activation is not kept alive

    def of(self, args: Any, rows: int) -> Tensor | None:
        """Tell whose the rows of an operation are, [rows]; None where sequences are outermost.

        Args:
            args: what the operation takes, nested or not.
            rows: the leading dimension of its result.

        Raises:
            ModelError: rows of several sequences are combined.
        """
        if not len(self._known):
            return None
        found: Tensor | None = None
        for leaf in pytree.tree_leaves(args):
            own = self._known.get(leaf) if isinstance(leaf, Tensor) else None
            if own is None or len(own) != rows:
                continue
            if found is not None and found is not own and not torch.equal(found, own):
                raise ModelError("Rows that were gathered from different sequences are combined.")
            found = own
        return found

    def follow(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        """Take note of an operation that has run."""
        if not len(self._known) and func not in _CHOICES:
            return  # every operation passes here
        if any(out is arg for arg in args[:1]) or getattr(func, "__name__", "").startswith(_SCATTERED):
            return  # rows go to places that are another's
        parts = [leaf for leaf in _each(out) if isinstance(leaf, Tensor)]
        owners = self._moved(func, args, kwargs, parts)
        for k, leaf in enumerate(parts):
            if leaf.requires_grad and leaf.ndim:
                self.note(leaf, self.of((args, kwargs), len(leaf)) if owners is None else owners[k])

    def note(self, out: Tensor, owners: Tensor | None) -> None:
        """Say whose a tensor's rows are."""
        if owners is not None:
            self._known[out] = owners

    def _moved(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: list[Tensor]) -> list[Tensor] | None:
        """Tell whose rows are, where an operation has chosen, split or joined them."""
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


def _each(out: Any) -> list[Any]:
    return [out] if isinstance(out, Tensor) else pytree.tree_leaves(out)


_CHOICES = (torch.Tensor.__getitem__, torch.index_select, torch.Tensor.index_select)
_SCATTERED = ("index_add", "index_put", "index_copy", "scatter")


def by_sequence(x: Tensor, n: int, owners: Tensor | None = None, fill: float = 0.0) -> Tensor:
    """Bring rows [n·k, …] into [n, k, …]; gathered ones in their order, as many as the most any sequence has.

    Args:
        x: rows.
        n: sequences.
        owners: whose they are; None where sequences are outermost.
        fill: what stands where a sequence has fewer.

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
