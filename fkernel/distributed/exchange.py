"""Rows of gradients for shards of parameters, and sums over ranks.

A parameter [l, *rest] is split along its leading dimension as torch.chunk does, which is FSDP2's rule too: rank r has
rows r⌈l/W⌉ … (r+1)⌈l/W⌉ − 1 of it, which may be none. Each rank computes rows of J for its own sequences; after the
exchange it has all sequences' rows, of its shard:

    J[own sequences, all of α]  →  J[all sequences, own α]          one `all_to_all_single` a bucket of parameters

so that a sum over parameters, such as a kernel, is a local contraction and one sum over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from fkernel.distributed.agreement import meet, wait
from fkernel.distributed.group import Group
from fkernel.shapes import Tensor, Tree

BUCKET = 32 << 20
"""Bytes that one collective moves, at most, where they are of several parameters."""


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


def buckets(sizes: Mapping[str, int], most: int = BUCKET) -> list[list[str]]:
    """Group successive parameters whose sizes add up to at most `most`; a larger one is a bucket by itself.

    Example:
        >>> buckets({"a": 3, "b": 2, "c": 9, "d": 1}, most=5)
        [['a', 'b'], ['c'], ['d']]
    """
    groups, held = list[list[str]](), most + 1
    for name, size in sizes.items():
        if held + size > most:
            groups, held = [*groups, []], 0
        groups[-1].append(name)
        held += size
    return groups


def exchange_rows(
    group: Group,
    write: Callable[[str, Tensor, int], None],
    counts: Sequence[int],
    shapes: Mapping[str, Sequence[int]],
    like: Tensor,
) -> Tree:
    """Exchange rows of some parameters' gradients: own sequences in whole → all sequences in this rank's shards.

    Args:
        group: the ranks.
        write: (name, out [n_own, r, *rest], start): writes rows start … start + r of a parameter's leading dimension.
        counts: number of sequences of each rank; `write` is not called on a rank that has none.
        shapes: {name: [l, *rest]}; a scalar's is [1].
        like: a tensor of the gradients' dtype and device.

    Returns:
        {name: [Σ counts, l_r, *rest]}, sequences in the order of ranks.
    """
    own = counts[group.rank]
    blocks = [[(name, _block(shape, group.size, rank)) for name, shape in shapes.items()] for rank in range(group.size)]
    sent = [own * sum(block.numel for _, block in of) for of in blocks]
    received = [count * sum(block.numel for _, block in blocks[group.rank]) for count in counts]
    result = _sent(group, _written(write, own, blocks, sent, like), received, sent)
    mine = blocks[group.rank]
    if len(mine) == 1:
        return {name: result.view(sum(counts), *block.shape) for name, block in mine}
    parts = [
        part.split([count * block.numel for _, block in mine])
        for part, count in zip(result.split(received), counts, strict=True)
    ]
    return {
        name: torch.cat([pieces[k].view(count, *block.shape) for pieces, count in zip(parts, counts, strict=True)])
        for k, (name, block) in enumerate(mine)
    }


def _written(
    write: Callable[[str, Tensor, int], None],
    own: int,
    blocks: list[list[tuple[str, _Block]]],
    sent: list[int],
    like: Tensor,
) -> Tensor:
    """Write what goes to each rank, one rank's after the other's."""
    out = like.new_empty(sum(sent))
    for part, of in zip(out.split(sent) if own else [], blocks, strict=bool(own)):
        for (name, block), piece in zip(of, part.split([own * block.numel for _, block in of]), strict=True):
            if piece.numel():
                write(name, piece.view(own, *block.shape), block.start)
    return out


def _sent(group: Group, out: Tensor, received: list[int], sent: list[int]) -> Tensor:
    """Exchange what was written, which is free on return."""
    if group.size == 1:
        meet(group)
        return out
    result = out.new_empty(sum(received))
    _all_to_all(group, result, out, received, sent)
    return result


class _Block(NamedTuple):
    """One rank's rows of a parameter: from `start` on, [l_r, *rest]."""

    start: int
    shape: tuple[int, ...]
    numel: int


def _block(shape: Sequence[int], size: int, rank: int) -> _Block:
    rows = shard_of(shape[0], size, rank)
    own = (rows.stop - rows.start, *shape[1:])
    return _Block(rows.start, own, math.prod(own))


def gather_numbers(group: Group, numbers: Sequence[int]) -> list[list[int]]:
    """Gather a few whole numbers from every rank, [ranks][numbers]; a meeting too."""
    own = torch.tensor(numbers, dtype=torch.int64)
    every = [torch.empty_like(own) for _ in range(group.size)]
    meet(group)
    wait(group, dist.all_gather(every, own, group=group.control, async_op=True))
    return [each.tolist() for each in every]


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


def fetch_rows(group: Group, shard: Tensor, length: int, rows: Tensor) -> Tensor:
    """Fetch some rows of a parameter from the ranks that have them; every rank its own, which may be none.

    Args:
        group: the ranks.
        shard: this rank's of the parameter, [l_r, *rest].
        length: l, of the parameter's leading dimension.
        rows: ids of any shape.

    Returns:
        [*rows.shape, *rest].

    Raises:
        IndexError: an id is outside of the parameter, as torch says it.
    """
    wanted, place = rows.reshape(-1).unique(return_inverse=True)
    if wanted.numel() and (int(wanted[0]) < 0 or int(wanted[-1]) >= length):
        raise IndexError(f"index {int(wanted[-1])} is out of range of {length} rows")
    shares = [shard_of(length, group.size, rank) for rank in range(group.size)]
    asked = [int(((wanted >= share.start) & (wanted < share.stop)).sum()) for share in shares]
    given = [counts[group.rank] for counts in gather_numbers(group, asked)]
    device = _device(group, [shard])
    ids = wanted.new_empty(sum(given), device=device)
    _all_to_all(group, ids, wanted.to(device), given, asked)
    own = shard[ids.to(shard.device) - shares[group.rank].start].to(device)
    found = own.new_empty(len(wanted), *shard.shape[1:])
    _all_to_all(group, found, own, asked, given)
    return found.to(shard.device)[place.to(shard.device)].view(*rows.shape, *shard.shape[1:])


def _all_to_all(group: Group, result: Tensor, sent: Tensor, received: list[int], counts: list[int]) -> None:
    meet(group)
    _finish(group, dist.all_to_all_single(result, sent, received, counts, group=group.data, async_op=True))


def gather_shards(group: Group, shards: Tree, shapes: Mapping[str, Sequence[int]]) -> Tree:
    """Gather parameters from their shards on all ranks, {name: [l, *rest]}, in one collective.

    Args:
        group: the ranks.
        shards: this rank's, {name: [l_r, *rest]}, of one dtype.
        shapes: the parameters'.
    """
    steps = {name: math.ceil((shape[0] if len(shape) else 1) / group.size) for name, shape in shapes.items()}
    widths = {name: math.prod(shape[1:]) for name, shape in shapes.items()}
    sizes = [steps[name] * widths[name] for name in shapes]
    like = next(iter(shards.values()))
    own = like.new_zeros(sum(sizes))
    for name, part in zip(shapes, own.split(sizes), strict=True):
        part[: shards[name].numel()] = shards[name].reshape(-1)
    result = like.new_empty(group.size * sum(sizes))
    meet(group)
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the newer name of the same
    _finish(group, gather(result, own, group=group.data, async_op=True))
    pieces = zip(shapes, result.view(group.size, -1).split(sizes, 1), strict=True)
    return {name: part.reshape(-1)[: math.prod(shapes[name])].view(list(shapes[name])) for name, part in pieces}


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
