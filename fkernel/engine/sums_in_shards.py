"""Sums over sequences where θ is in shards: all ranks walk through the layers together, each with its own sequences.

    for layer L … 1:   θ[layer] gathered;   g = Σ_n w_n ∇f(n)[layer] over own sequences
                       g summed over ranks into shards, and let go

All ranks gather the same layers, so that each walks as often as the others: one that has no sequence left walks one of
another's, with weight 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from fkernel.boundary import public
from fkernel.distributed import Group, ShardedTree, all_sum, buckets, exchange_rows, share_of
from fkernel.engine.batching import SortedBatch, error_context
from fkernel.engine.layerwise import Walking, must_cut
from fkernel.engine.over_ranks import like_of
from fkernel.engine.planning.walking import tiles_of
from fkernel.engine.planning.workloads import LONG
from fkernel.func.handles import Handles, weighted_sum
from fkernel.func.inputs import plain, take, trim, widened
from fkernel.func.layers import Walk, values_along
from fkernel.func.trust import Values
from fkernel.shapes import Tensor, Tree


class _Own(NamedTuple):
    """What a rank walks of a tile: rows of the sorted batch, whether they count, and how many the tile has."""

    rows: slice
    counts: bool
    all: int
    walk: Walk


def gradient_in_shards(
    side: SortedBatch,
    params: ShardedTree,
    weights: Tensor,
    how: Walking,
    of: Callable[[Handles, Tensor], Tree] = weighted_sum,
    on_progress: Callable[[int], Any] = lambda n: None,
) -> Tree:
    """Compute Jᵀw, this rank's shard of it, {name: [l_r, *rest]}.

    Args:
        side: the sorted batch, with its f.
        params: θ.
        weights: w, [n] in the caller's order.
        how: block size and checkpointing of layer inputs.
        of: another sum over sequences, of handles and weights: `func.squared_sum`.
        on_progress: called with the number of sequences, of all ranks, after each group of them.
    """
    w = weights[side.order.to(weights.device)].to(like_of(next(iter(params.values()))))
    total = {name: torch.zeros_like(widened(shard)) for name, shard in params.own.items()}
    for own in _walks(side, params, how, w):
        mine = w[own.rows] if own.counts else torch.zeros_like(w[own.rows])
        for piece in own.walk.pieces():
            summed: dict[str, Tensor] = {}
            for some, handles in piece:
                for name, leaf in of(handles, mine[some]).items():
                    summed[name] = summed[name].add_(leaf) if name in summed else leaf
                del handles
            for name, shard in _into_shards(summed, params).items():
                total[name] += shard
        on_progress(own.all)
    return total


def values_in_shards(side: SortedBatch, params: ShardedTree, how: Walking) -> Tensor:
    """Compute f of a batch, [n] float64 in the caller's order, on every rank."""
    total = torch.zeros(len(side), dtype=torch.float64, device=next(iter(params.values())).device)
    assert side.f is not None
    L = len(must_cut(side.f, params, side.batch).layers)
    # One layer's inputs are there at a time, so that of L times the tokens no more are.
    for own in _walks(side, params, how._replace(every=L + 1, together=L * LONG)):
        if own.counts:
            total[side.order[own.rows].to(total.device)] = own.walk.values.to(total)
    return all_sum(params.group, [total])[0]


@public
def values_of_step(params: Tree, batch: Any, delta: Tree) -> Values | None:
    """Return how a certificate evaluates f along a step; None where θ is whole on this rank, and f is run whole.

    Args:
        params: θ.
        batch: E, whose cut the certificate's sequences take.
        delta: Δθ, this rank's shards.

    Example:
        >>> values_of_step({"w": torch.zeros(2)}, torch.eye(2), {"w": torch.ones(2)}) is None
        True
    """
    if not isinstance(params, ShardedTree):
        return None
    return lambda f, few, scales: values_along(must_cut(f, params, batch), params, delta, scales, few)


def _walks(side: SortedBatch, params: ShardedTree, how: Walking, weights: Tensor | None = None) -> Iterator[_Own]:
    """Walk this rank's share of each tile; tiles whose weights are all 0 are skipped by all."""
    assert side.f is not None
    group, calls = params.group, dict[Any, Any]()
    with error_context(side.name):
        cut = must_cut(side.f, params, side.batch)
    together = None if how.together is None else group.size * max(how.together, how.tokens)
    for tile in tiles_of(side.tokens, together):
        if weights is not None and not bool(weights[tile].any()):
            continue
        own = share_of(tile, group.size, group.rank)
        rows = own if own.stop > own.start else slice(tile.start, tile.start + 1)
        with error_context(side.name, side.order[rows]):
            part = trim(take(side.batch, rows))
            walk = Walk(cut, plain(params), part, every=how.every, tokens=how.tokens, calls=calls)
        yield _Own(rows, own.stop > own.start, tile.stop - tile.start, walk)


def _into_shards(vectors: Tree, params: ShardedTree) -> Tree:
    """Sum some parameters' vectors over ranks, each rank its shard."""
    group: Group = params.group
    sizes = {name: leaf.numel() * leaf.element_size() for name, leaf in vectors.items()}
    shards: Tree = {}

    def write(name: str, out: Tensor, start: int) -> None:
        out[0] = vectors[name][start : start + out.shape[1]] if vectors[name].ndim else vectors[name][None]

    for names in buckets(sizes):
        shapes = {name: vectors[name].shape or (1,) for name in names}
        rows = exchange_rows(group, write, [1] * group.size, shapes, like_of(params[names[0]]))
        shards |= {name: each.sum(0) for name, each in rows.items()}
    return shards
