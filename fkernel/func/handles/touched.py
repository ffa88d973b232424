"""Gradients of many matrices in one parameter [s, …], of which each sequence uses few.

    g_n[e] = Σ_{r: e_r = e} δ_nr a_nrᵀ  (a matrix)      g_n[e] = Σ_{r: e_r = e} δ_nr  (an addend)

Stored are only the matrices of the experts that a sequence's router chose; see
`fkernel.func.handles.forms.SparseRows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fkernel.func.handles.forms import SparseRows
from fkernel.func.inputs.objective import is_readable
from fkernel.shapes import Tensor


class Touch(NamedTuple):
    """Inputs and cotangents of some of a parameter's matrices.

    Attributes:
        ids: e, [n r]; −1 where there is no row.
        left: δ, [n r …]; a for a matrix [i, o].
        right: a, [n r i]; δ for a matrix [i, o]; None where rows are added.
    """

    ids: Tensor
    left: Tensor
    right: Tensor | None = None


def touched_rows(touches: Sequence[Touch], size: int) -> SparseRows | None:
    """Combine the uses of a parameter [s, …] into its gradients; None where no sequence used any matrix.

    Args:
        touches: its uses, by the same n sequences.
        size: s.

    Example:
        >>> ids, a = torch.tensor([[2, 2], [0, -1]]), torch.tensor([[[1.0], [2.0]], [[4.0], [0.0]]])
        >>> rows = touched_rows([Touch(ids, torch.ones(2, 2, 1), a)], 3)
        >>> rows.ids.tolist(), rows.cotangents.flatten().tolist()
        ([[2], [0]], [3.0, 4.0])
    """
    n, first = len(touches[0].ids), touches[0].left
    r = sum(touch.ids.shape[1] for touch in touches)
    if all(touch.right is None for touch in touches) and first.ndim == 3 and r <= size:  # few and small
        ids = torch.cat([touch.ids.clamp(min=0) for touch in touches], 1)
        return SparseRows(ids, torch.cat([touch.left for touch in touches], 1), size)
    if not is_readable(first):  # the largest possible size
        right = touches[0].right
        shape = first.shape[2:] if right is None else (first.shape[-1], right.shape[-1])
        ids = touches[0].ids.new_zeros(n, min(r, size))
        return SparseRows(ids, first.new_empty(*ids.shape, *shape), size)
    blocks: dict[int, Tensor] = {}
    for touch in touches:
        for key, block in _blocks(touch, size):
            blocks[key] = blocks[key] + block if key in blocks else block
    if not blocks:
        return None
    keys = sorted(blocks)
    owners = torch.tensor(keys) // size
    counts = torch.bincount(owners, minlength=n)
    place = (torch.arange(len(keys)) - (counts.cumsum(0) - counts)[owners]).tolist()
    ids = torch.zeros(n, int(counts.max()), dtype=torch.int64)
    out = first.new_zeros(*ids.shape, *blocks[keys[0]].shape)
    for key, k in zip(keys, place, strict=True):
        ids[key // size, k] = key % size
        out[key // size, k] = blocks.pop(key)  # frees each block as it is copied
    return SparseRows(ids.to(out.device), out, size)


def _blocks(touch: Touch, size: int) -> list[tuple[int, Tensor]]:
    """Sum the gradients of each sequence and matrix, as (n·s + e, sum)."""
    n = len(touch.ids)
    moved = (touch.left != 0).flatten(2).any(2) & (touch.ids >= 0)  # padding is routed too, with zero cotangents
    moved &= True if touch.right is None else (touch.right != 0).any(2)
    keys = (touch.ids + size * torch.arange(n, device=touch.ids.device)[:, None])[moved]
    order = torch.argsort(keys, stable=True)
    distinct, counts = torch.unique_consecutive(keys[order], return_counts=True)
    each = counts.tolist()
    lefts = touch.left[moved][order].split(each)
    if touch.right is None:
        sums = (left.sum(0) for left in lefts)
    else:
        rights = touch.right[moved][order].split(each)
        sums = (left.mT @ right for left, right in zip(lefts, rights, strict=True))
    return [*zip(distinct.tolist(), sums, strict=True)] if each else []
