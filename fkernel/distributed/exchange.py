"""Rows of gradients for shards of parameters, and sums over ranks.

A parameter [l, *rest] is split along its leading dimension as torch.chunk does, which is FSDP2's rule too: rank r has
rows r⌈l/W⌉ … (r+1)⌈l/W⌉ − 1 of it, which may be none. Each rank computes rows of J for its own sequences; after the
exchange it has all sequences' rows, of its shard:

    J[own sequences, all of α]  →  J[all sequences, own α]          one `all_to_all_single` a parameter

so that a sum over parameters, such as a kernel, is a local contraction and one sum over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from fkernel.distributed.agreement import meet, wait
from fkernel.distributed.group import Group
from fkernel.shapes import Tensor, Tree


def shard_of(length: int, size: int, rank: int) -> slice:
    """Return the rows of a leading dimension that a rank has, by torch.chunk's rule.

    Example:
        >>> [shard_of(5, 4, rank) for rank in range(4)]  # 2, 2, 1 and none
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None), slice(5, 5, None)]
    """
    step = math.ceil(length / size)
    return slice(min(rank * step, length), min((rank + 1) * step, length))


def share_of(rows: slice, size: int, rank: int) -> slice:
    """Return a rank's share of a range of sequences: as even as can be, in order.

    Example:
        >>> [share_of(slice(2, 7), 3, rank) for rank in range(3)]
        [slice(2, 3, None), slice(3, 5, None), slice(5, 7, None)]
    """
    n = rows.stop - rows.start
    return slice(rows.start + n * rank // size, rows.start + n * (rank + 1) // size)


def shard_tree(group: Group, x: Tree) -> Tree:
    """Return this rank's shard of a vector, {name: [l_r, *rest]}: views; a scalar counts as one row."""
    return {name: _rows(leaf)[shard_of(len(_rows(leaf)), group.size, group.rank)] for name, leaf in x.items()}


def _rows(leaf: Tensor) -> Tensor:
    return leaf if leaf.ndim else leaf[None]


def exchange_rows(
    group: Group,
    write: Callable[[Tensor, int], None] | None,
    counts: Sequence[int],
    shape: Sequence[int],
    like: Tensor,
) -> Tensor:
    """Exchange rows of one parameter's gradients: own sequences in whole → all sequences in this rank's shard.

    Args:
        group: the ranks.
        write: (out [n_own, r, *rest], start): writes rows start … start + r of the parameter's leading dimension;
            None where this rank has no sequence.
        counts: number of sequences of each rank.
        shape: the parameter's, [l, *rest].
        like: a tensor of the gradients' dtype and device.

    Returns:
        [Σ counts, l_r, *rest], sequences in the order of ranks.
    """
    l, rest = shape[0], list(shape[1:])
    width = math.prod(rest)
    shards = [shard_of(l, group.size, rank) for rank in range(group.size)]
    lengths = [shard.stop - shard.start for shard in shards]
    sent = [counts[group.rank] * length * width for length in lengths]
    received = [count * lengths[group.rank] * width for count in counts]
    out, result = like.new_empty(sum(sent)), like.new_empty(sum(received))
    if write is not None:
        for block, shard in zip(out.split(sent), shards, strict=True):
            if block.numel():
                write(block.view(counts[group.rank], shard.stop - shard.start, *rest), shard.start)
    meet(group)
    if group.size == 1:
        return out.view(counts[0], l, *rest)
    _finish(group, dist.all_to_all_single(result, out, received, sent, group=group.data, async_op=True))
    return result.view(sum(counts), lengths[group.rank], *rest)


def all_sum(group: Group, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sum tensors over all ranks, as one collective in float64 where any is; inputs are not changed.

    Args:
        group: the ranks.
        tensors: the same shapes on every rank, on any device.
    """
    device = _device(group, tensors)
    dtype = torch.float64 if any(leaf.dtype == torch.float64 for leaf in tensors) else tensors[0].dtype
    flat = torch.cat([leaf.reshape(-1).to(device, dtype) for leaf in tensors])
    meet(group)
    _finish(group, dist.all_reduce(flat, group=group.data, async_op=True))
    parts = flat.split([leaf.numel() for leaf in tensors])
    return [part.view(leaf.shape).to(leaf) for part, leaf in zip(parts, tensors, strict=True)]


def gather_shards(group: Group, shard: Tensor, shape: Sequence[int]) -> Tensor:
    """Gather the shards of one parameter from all ranks, [l, *rest].

    Args:
        group: the ranks.
        shard: this rank's, [l_r, *rest].
        shape: the parameter's.
    """
    l, rest = (shape[0], shape[1:]) if len(shape) else (1, ())
    step = math.ceil(l / group.size)
    own = shard.new_zeros(step, *rest)
    own[: len(shard)] = shard
    result = shard.new_empty(step * group.size, *rest)
    meet(group)
    _finish(group, dist.all_gather_into_tensor(result, own, group=group.data, async_op=True))
    return result[:l].view(list(shape))


def _finish(group: Group, work: object) -> None:
    """Wait for a data collective: on the host for gloo; NCCL's is waited for in the device's stream."""
    if group.blocking:
        wait(group, work)
    elif work is not None:
        work.wait()  # pyright: ignore[reportAttributeAccessIssue]


def _device(group: Group, tensors: Sequence[Tensor]) -> torch.device:
    if group.blocking:
        return tensors[0].device
    return torch.device("cuda", torch.cuda.current_device())
