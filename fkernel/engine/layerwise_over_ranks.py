"""The contraction with layers as the outer loop, over several ranks: long sequences, split over them.

    for tile in held:  for block in streamed:
        for shard in (head and after, layer L, …, layer 1, before):         every rank walks its own sequences
            J_held[own, layer]      →  J_held[all, own shard]                exchanged once
            for u in own block:  J_u[layer] →  J_u[own shard]                exchanged, contracted, dropped
                sums += products(J_held[all, own shard], J_u[own shard])
    K = Σ over ranks of sums

Memory of a rank: of the held tile a share of one layer's gradients in whole, and all of them in its shard of the layer.
What is exchanged at a time is as many sequences as fit `BUCKET`, at least one: a table's gradients are as large as many
layers', and come of all sequences together.

A rank without a sequence walks one of another's, and tells nothing of it, so that all ranks exchange alike.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

from fkernel.distributed import BUCKET, Group, exchange_rows, gather_numbers, shard_of, share_of
from fkernel.engine.batching import SortedBatch
from fkernel.engine.by_layer import Side, shards
from fkernel.engine.layerwise import Walking, must_cut
from fkernel.engine.over_ranks import like_of, summed
from fkernel.engine.planning.walking import tiles_of
from fkernel.engine.recycling import release_memory
from fkernel.engine.streaming import KernelBlock, arranged
from fkernel.func.handles import (
    Concat,
    Handle,
    Handles,
    Piece,
    Products,
    ProductSpec,
    at,
    count,
    materialize_into,
)
from fkernel.func.inputs import Source, plain, take, trim
from fkernel.func.layers import Cut, Walk
from fkernel.shapes import Tensor, Tree

Nodes = tuple[tuple[float, Source], ...]


class _Share(NamedTuple):
    """One rank's sequences of a tile.

    Attributes:
        side: them, or one of another rank's where it has none.
        counts: number of sequences of every rank.
        starts: the first of every rank's, in sorted order.
    """

    side: Side
    counts: list[int]
    starts: list[int]


def layered_over_ranks(
    E: SortedBatch,
    U: SortedBatch | None,
    nodes: Nodes,
    params: Tree,
    spec: ProductSpec,
    how: Walking,
    group: Group,
    *,
    held: str = "E",
    tile: int | None = None,
    block: int | None = None,
) -> Iterator[KernelBlock]:
    """Compute all products of `spec`, layer by layer; as `fkernel.engine.layerwise.layered`, with its arguments.

    Args:
        E: the rows.
        U: the columns; None for products of rows alone.
        nodes: where E's gradients are taken, (q_j, source).
        params: θ, where U's are.
        spec: the products to compute, of this rank's shards: `over_ranks.sharded_spec`.
        how: sizes of blocks, and which layer inputs are kept.
        group: the ranks, which all have the same arguments.
        held: the batch whose gradients of a layer are held, "E" or "U".
        tile: tokens of it that each rank holds at a time; None for all.
        block: tokens of the other batch that each rank takes beside them; None for all.

    Yields:
        One `KernelBlock` a tile of E; one in all where U is held. Every rank has the whole of it.
    """
    size = group.size
    E_side = (E, nodes)
    U_side = None if U is None else (U, ((1.0, plain(params)),))
    (own, at), other = (E_side, U_side) if U_side is None or held == "E" else (U_side, E_side)
    cut, other_cut = _cut(own, params), None if other is None else _cut(other[0], params)

    def walk(spec: ProductSpec) -> Iterator[tuple[slice, Products]]:
        for some in tiles_of(own.tokens, None if tile is None else tile * size):
            n = some.stop - some.start
            products = Products(spec, n, 0 if other is None else len(other[0]), own.order.device)
            x = _share(own, at, cut, some, group)
            if other is None:
                _alone(cut, x, products, how, group, params)
            else:
                assert other_cut is not None
                for passing in tiles_of(other[0].tokens, None if block is None else block * size):
                    y = _share(*other, other_cut, passing, group)
                    _contract(other_cut, x, y, products, passing.start == 0, how, group, params)
            yield some, products

    for one in arranged(E, U, spec, held, walk):
        yield summed(one, group)


def gradients_over_ranks(
    side: SortedBatch, nodes: Nodes, params: Tree, how: Walking, group: Group
) -> Iterator[tuple[slice, Handles]]:
    """Iterate over gradients of one batch, layer by layer: (rows in sorted order, this rank's shards of a layer).

    They add up to Σ_j q_j ∇f(θ_j), since each node of the path is walked by itself; every rank gets the same rows.

    Args:
        side: the sorted batch, with its f.
        nodes: where gradients are taken, (q_j, source).
        params: θ.
        how: sizes of blocks, and which layer inputs are kept.
        group: the ranks, which all have the same arguments.
    """
    cut, calls = _cut(side, params), dict[Any, Any]()
    together = None if how.together is None else group.size * max(how.together, how.tokens)
    for tile in tiles_of(side.tokens, together):
        share = _share(side, nodes, cut, tile, group)
        for q, source in nodes:
            walk = Walk(cut, source, share.side.batch, weight=q, every=how.every, tokens=how.tokens, calls=calls)
            for piece in walk.pieces():
                first = next(piece)
                if not first[1]:  # nothing is trained there; the walk must run on
                    deque(piece, maxlen=0)
                    continue
                yield from _rounds(chain([first], piece), share, group, params, [*first[1]])


def _cut(side: SortedBatch, params: Tree) -> Cut:
    assert side.f is not None
    return must_cut(side.f, params, side.batch)


def _share(side: SortedBatch, nodes: Nodes, cut: Cut, rows: slice, group: Group) -> _Share:
    shares = [share_of(rows, group.size, rank) for rank in range(group.size)]
    mine = shares[group.rank]
    if mine.stop == mine.start:
        mine = slice(rows.start, rows.start + 1)
    batch = trim(take(side.batch, mine))
    return _Share(Side(batch, nodes, cut), [s.stop - s.start for s in shares], [s.start for s in shares])


def _alone(cut: Cut, x: _Share, products: Products, how: Walking, group: Group, params: Tree) -> None:
    for shard in shards(cut, x.side, x.side, every=how.every, tokens=how.tokens):
        own = _held(shard.held, x.counts, group, params)
        products.add(own, own, own_y=False)


def _contract(
    cut: Cut,
    x: _Share,
    y: _Share,
    products: Products,
    first: bool,
    how: Walking,
    group: Group,
    params: Tree,
) -> None:
    """Hold x's shards of a layer, and contract those of y's sequences with them as they are exchanged."""
    for shard in shards(cut, x.side, y.side, every=how.every, tokens=how.tokens):
        release_memory()  # which the passes took, in blocks unlike those of the exchange
        held, own_x = _held(shard.held, x.counts, group, params), first
        for columns, handles in _rounds(shard.streamed, y, group, params, [*shard.held]):
            products.add(held, handles, columns, own_x=own_x)
            own_x = False
            del handles  # frees them before the next are exchanged
        del shard, held  # frees them before the next layer's are


def _rounds(
    streamed: Iterator[tuple[slice, Mapping[str, Handle]]], y: _Share, group: Group, params: Tree, names: list[str]
) -> Iterator[tuple[slice, Handles]]:
    """Exchange every rank's next block until all have ended: (columns of one rank's, this rank's shards of them)."""
    mine = y.counts[group.rank]
    streamed = _few(streamed, _step(names, params))
    while True:
        rows, handles = next(streamed, (None, {}))
        own = slice(0, 0) if rows is None or not mine else rows
        told = gather_numbers(group, [int(rows is not None), own.start, own.stop])
        if not any(going for going, _, _ in told):
            return
        counts = [stop - start for _, start, stop in told]
        if not sum(counts):
            continue
        if own.stop == own.start:
            handles = {}
        received = _exchanged({name: handles.get(name) for name in names}, counts, group, params)
        del handles
        place = 0
        for (_, start, _), n, base in zip(told, counts, y.starts, strict=True):
            if n:
                yield slice(base + start, base + start + n), {key: r[place : place + n] for key, r in received.items()}
            place += n
        del received  # frees them before the next are computed


def _step(names: Iterable[str], params: Tree) -> int:
    """How many sequences of each rank are exchanged at a time."""
    each = sum(params[name].numel() for name in names) * like_of(next(iter(params.values()))).element_size()
    return max(1, BUCKET // max(1, each))


def _few(streamed: Iterator[tuple[slice, Mapping[str, Handle]]], step: int) -> Iterator[tuple[slice, Handles]]:
    """Split blocks of sequences into smaller ones."""
    for rows, handles in streamed:
        for start in range(rows.start, rows.stop, step):
            some = slice(start, min(start + step, rows.stop))
            own = slice(some.start - rows.start, some.stop - rows.start)
            yield some, {name: _some(handle, own) for name, handle in handles.items()}
        del handles  # frees them before the next are computed


def _some(handle: Handle, rows: slice) -> Handle:
    """Take successive sequences of a handle."""
    if not isinstance(handle, Concat):
        return at(handle, rows)
    parts, start = list[Piece](), 0
    for part in handle.parts:
        first, last = max(rows.start - start, 0), min(rows.stop - start, count(part))
        if first < last:
            parts.append(at(part, slice(first, last)))
        start += count(part)
    return Concat(tuple(parts))


def _held(handles: Any, counts: list[int], group: Group, params: Tree) -> Tree:
    """Exchange one layer's gradients of all held sequences, a few at a time."""
    step, like = _step(handles, params), like_of(next(iter(params.values())))
    if max(counts) <= step:
        return _exchanged(handles, counts, group, params)
    starts, held = [sum(counts[:rank]) for rank in range(group.size)], dict[str, Tensor]()
    for name in handles:
        l, *rest = params[name].shape or (1,)
        shard = shard_of(l, group.size, group.rank)
        held[name] = like.new_empty(sum(counts), shard.stop - shard.start, *rest)
    for first in range(0, max(counts), step):
        some = [min(max(n - first, 0), step) for n in counts]
        own = slice(first, first + some[group.rank])
        mine = {name: _some(handle, own) if own.stop > own.start else handle for name, handle in handles.items()}
        received = _exchanged(mine, some, group, params)
        for name in handles:
            for start, n, part in zip(starts, some, received.pop(name).split(some), strict=True):
                held[name][start + first : start + first + n] = part
                del part  # a view, which would keep what was received while the next rows are
    return held


def _exchanged(handles: Any, counts: list[int], group: Group, params: Tree) -> Tree:
    """Exchange one layer's gradients of own sequences for all sequences' in this rank's shard."""
    shapes = {name: params[name].shape or (1,) for name in handles}

    def write(name: str, out: Tensor, start: int) -> None:
        if params[name].ndim:
            materialize_into(handles[name], out, start)
        else:
            out[:, 0] = handles[name]

    return exchange_rows(group, write, counts, shapes, like_of(next(iter(params.values()))))
