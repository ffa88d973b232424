"""Gradients over several processes: sequences are split over ranks, and after an exchange parameters are.

    for round in batch:   J[own share of the round, all of α]           computed, without communication
        for parameter:    J[own share, α]  →  J[round, own shard of α]   one `all_to_all_single`
                          sums += products(J_E[all, shard], J_U[round, shard])
    K = Σ over ranks of sums                                              one all-reduce a block of rows

Every product of a `ProductSpec` is a sum over coordinates, so that the contraction of `fkernel.engine.streaming` runs
unchanged on each rank's shard. Of the held batch a rank holds shards of all rows, of the other one parameter's rows of
a round at a time. Bytes that a rank sends, of n sequences and P parameters in all:

    n P (W − 1)/W²   a pass over a batch,     n_E n_U 8   a sum over ranks of K
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fkernel.distributed import (
    Group,
    agree,
    all_sum,
    buckets,
    exchange_rows,
    gather_shards,
    group_of,
    shard_of,
    shard_tree,
    share_of,
    together,
)
from fkernel.engine.batching import SortedBatch, cuts_of
from fkernel.engine.gradients import Gradients, computed
from fkernel.engine.path import Nodes
from fkernel.engine.streaming import KernelBlock
from fkernel.func.handles import Handles, ProductSpec, RowSpec, materialize_into
from fkernel.func.inputs import widened
from fkernel.io import fingerprint
from fkernel.shapes import Tensor, Tree


@contextmanager
def over(mesh: Any, what: str, given: dict[str, Any]) -> Iterator[Group | None]:
    """Enter work of all ranks of a mesh, after they agree on what they were given; nothing without a mesh.

    Args:
        mesh: a `DeviceMesh` of one dimension, or None.
        what: the work, for messages.
        given: {name: batch, tree, or anything with a text}, equal on all ranks.

    Raises:
        ProcessError: ranks were given different things, or one of them fails; every rank raises it.
    """
    if mesh is None:
        yield None
        return
    group = group_of(mesh)
    with together(group, what):
        agree(group, "the versions of fkernel and torch", f"{_version()}, {torch.__version__}")
        for name, value in given.items():
            agree(group, name, described(value))
        yield group


def ranks_of(group: Group | None) -> int | None:
    """Count the ranks; None without a group."""
    return None if group is None else group.size


def described(value: Any) -> str:
    """Describe a batch, tree or setting in a text that tells others apart.

    Tensors count with shape, dtype and a checksum over their bits; names in their order, since parameters are exchanged
    in it.

    Example:
        >>> described({"w": torch.zeros(2)})
        "['w'] [2] torch.float32 0"
    """
    leaves, _ = pytree.tree_flatten_with_path(value)
    return "; ".join(f"{pytree.keystr(path)} {_leaf(leaf)}" for path, leaf in leaves)


def _leaf(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return str(leaf) if isinstance(leaf, str | int | float | bool | None) else type(leaf).__qualname__
    if not leaf.is_floating_point():
        return f"{list(leaf.shape)} {leaf.dtype} {fingerprint(leaf.cpu())[:16]}"
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[leaf.element_size()]
    # A sum of integers is exact in any order, so that it does not depend on a rank's number of threads.
    total = int(leaf.detach().contiguous().view(-1).view(bits).sum(dtype=torch.int64)) if leaf.numel() else 0
    return f"{list(leaf.shape)} {leaf.dtype} {total}"


def rounds(side: SortedBatch, tokens: int | None, size: int) -> list[slice]:
    """Cut a sorted batch into rounds, in which each of `size` ranks computes one microbatch of about `tokens`."""
    return cuts_of(side, None if tokens is None else tokens * size)


def ranked(
    side: SortedBatch,
    nodes: Nodes,
    tokens: int | None,
    group: Group,
    params: Tree,
    promised: bool = False,
    change: Callable[[Gradients], Gradients] | None = None,
) -> Gradients:
    """Gradients of one batch in this rank's shards, computed by all ranks on demand; see `exchanged`.

    Args:
        side: the sorted batch, with its f.
        nodes: (q_j, θ_j) of a path; without one, θ with weight 1.
        tokens: of a microbatch of each rank, at most; None for no limit.
        group: the ranks.
        params: θ.
        promised: whether a memory budget was given.
        change: applied to whole gradients of own sequences: a preconditioner that is no diagonal.
    """
    at = rounds(side, tokens, group.size)
    J = computed(side, nodes, [share_of(rows, group.size, group.rank) for rows in at], promised)
    return exchanged(J if change is None else change(J), at, group, params)


def exchanged(J: Gradients, at: Sequence[slice], group: Group, params: Tree) -> Gradients:
    """Exchange gradients: own sequences, all parameters → all sequences, own shards.

    Args:
        J: gradients of which this rank reads its own share of every round.
        at: the rounds, in sorted order.
        group: the ranks.
        params: θ, for shapes and dtypes.

    Returns:
        Gradients whose microbatches are the rounds; a read of some parameters exchanges these, and computes the share
        where it is not the last one that was. All ranks must read the same.
    """
    latest: dict[int, Handles] = {}

    def local(i: int) -> Handles:
        if i not in latest:
            latest.clear()
            rows = share_of(at[i], group.size, group.rank)
            latest[i] = J.read(i) if rows.stop > rows.start else {}
        return latest[i]

    most = max((rows.stop - rows.start for rows in at), default=1)
    shares = [own for names in _by_dtype(params) for own in buckets({n: most * _nbytes(params[n]) for n in names})]

    def read(i: int, names: Sequence[str] | None = None) -> Handles:
        handles = local(i)
        each = [share_of(at[i], group.size, rank) for rank in range(group.size)]
        counts = [rows.stop - rows.start for rows in each]
        result: dict[str, Tensor] = {}
        for own in shares if names is None else [names]:
            result |= _exchanged(group, handles, counts, {name: params[name] for name in own})
        return result

    return Gradients(J.side, at, read, J.computed, shares=shares)


def _exchanged(group: Group, handles: Handles, counts: Sequence[int], params: Tree) -> Tree:
    def write(name: str, out: Tensor, start: int) -> None:
        if params[name].ndim:
            materialize_into(handles[name], out, start)
        else:
            handle = handles[name]
            assert isinstance(handle, Tensor)  # a scalar's gradients have no structure
            out[:, 0] = handle

    shapes = {name: leaf.shape or (1,) for name, leaf in params.items()}
    return exchange_rows(group, write, counts, shapes, like_of(next(iter(params.values()))))


def like_of(leaf: Tensor) -> Tensor:
    """An empty tensor of a parameter's device, and of the dtype that its gradients are computed in."""
    return widened(leaf.detach().new_empty(0))


def _nbytes(leaf: Tensor) -> int:
    return leaf.numel() * like_of(leaf).element_size()


def _by_dtype(params: Tree) -> list[list[str]]:
    """Group the names by the dtype of their gradients, in their order."""
    groups: dict[torch.dtype, list[str]] = {}
    for name, leaf in params.items():
        groups.setdefault(like_of(leaf).dtype, []).append(name)
    return [*groups.values()]


def held_shards(J: Gradients, tile: int | None, group: Group, params: Tree) -> Gradients:
    """Hold this rank's shards of a tile's rows, {name: [n_tile, l_r, *rest]}: one tile at a time, which is kept.

    Args:
        J: exchanged gradients.
        tile: tokens of a tile; None for all.
        group: the ranks.
        params: θ, for shapes and dtypes.
    """
    tiles = [*J.blocks(tile)]
    cuts = [J.rows(block) for block in tiles]
    kept: dict[int, Tree] = {}

    def read(k: int, names: Sequence[str] | None = None) -> Handles:
        if k not in kept:
            kept.clear()
            kept[k] = _filled(J, tiles[k], cuts[k], group, params)
        return kept[k] if names is None else {name: kept[k][name] for name in names}

    return Gradients(J.side, cuts, read, len(J), shares=J.shares)


def _filled(J: Gradients, block: Sequence[int], rows: slice, group: Group, params: Tree) -> Tree:
    n, held = rows.stop - rows.start, dict[str, Tensor]()
    for name, leaf in params.items():
        l, *rest = leaf.shape or (1,)
        shard = shard_of(l, group.size, group.rank)
        held[name] = like_of(leaf).new_empty(n, shard.stop - shard.start, *rest)
    for i in block:
        here = slice(J.cuts[i].start - rows.start, J.cuts[i].stop - rows.start)
        for names in J.shares or [[*params]]:
            for name, rows_of_shard in J.read(i, names).items():
                held[name][here] = rows_of_shard  # pyright: ignore[reportArgumentType]
    return held


def sharded_spec(spec: ProductSpec, group: Group) -> ProductSpec:
    """Return the products of this rank's shards; their sums over ranks are those of `spec`."""

    def of(trees: Any) -> dict[str, Tree | None]:
        return {what: None if leaf is None else shard_tree(group, leaf) for what, leaf in trees.items()}

    def rows(own: RowSpec) -> RowSpec:
        return RowSpec({what: shard_tree(group, leaf) for what, leaf in own.along.items()}, of(own.squares))

    return ProductSpec(of(spec.kernels), rows(spec.x), rows(spec.y), spec.key)


def summed(block: KernelBlock, group: Group) -> KernelBlock:
    """Sum a block's products over all ranks, in one collective."""
    leaves, spec = pytree.tree_flatten(block.sums)
    return KernelBlock(block.at, *pytree.tree_unflatten(all_sum(group, leaves), spec))


def own_shard(vector: Tree, group: Group | None) -> Tree:
    """Return this rank's shard of a vector; all of it without a group."""
    return vector if group is None else shard_tree(group, vector)


def over_all(values: Tensor, group: Group | None) -> Tensor:
    """Sum products of shards over ranks; those of one process are complete."""
    return values if group is None else all_sum(group, [values])[0]


def whole_tree(shards: Tree, group: Group, params: Tree) -> Tree:
    """Gather a vector from its shards on every rank, {name: [*shape]}."""
    whole: Tree = {}
    for names in in_buckets(params):
        own, shapes = {name: shards[name] for name in names}, {name: params[name].shape for name in names}
        whole |= gather_shards(group, own, shapes)
    return whole


def in_buckets(params: Tree) -> list[list[str]]:
    """Group parameters for collectives over vectors of their size: of one dtype, in buckets."""
    return [own for names in _by_dtype(params) for own in buckets({name: _nbytes(params[name]) for name in names})]


def _version() -> str:
    try:
        return metadata.version("fkernel")
    except metadata.PackageNotFoundError:  # a source tree on the path
        return "not installed"
