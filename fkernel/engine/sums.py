"""Jᵀw of a batch and ⟨∇f, v⟩ of its sequences, without products of pairs; on several ranks, each computes a share.

Jᵀw = Σ_n w_n ∇f(n)                a sum over ranks of vectors of the parameters' size
⟨∇f(n), v⟩                          every rank's own sequences, put together
"""

from __future__ import annotations

from typing import Any

import torch

from fkernel import func
from fkernel.boundary import public
from fkernel.distributed import Group, ShardedTree, all_sum
from fkernel.engine.batching import SortedBatch, cuts_of, error_context
from fkernel.engine.gradients import computed
from fkernel.engine.layerwise import Walking, along_sorted, gradient_sum, values_of
from fkernel.engine.over_ranks import in_buckets
from fkernel.engine.planning.estimates import walking_of
from fkernel.engine.sums_in_shards import gradient_in_shards, values_in_shards
from fkernel.func.inputs import Function, check_values, check_weights, length, plain, take, token_grant, widened
from fkernel.func.trust import along_direction
from fkernel.shapes import Tensor, Tree


@public
def weighted_gradient(
    f: Function, params: Tree, U: Any, weights: Tensor, how: Walking | int | None, group: Group | None = None
) -> Tree:
    """Compute Jᵀw, {name: [*shape]}, on every rank; this rank's shards of it where θ is in shards.

    Args:
        f: (params, batch) -> [n].
        params: θ.
        U: the batch.
        weights: w, [n].
        how: a walk layer by layer, or the microbatch of whole passes.
        group: the ranks; None for this process alone.

    Example:
        >>> f = lambda params, x: x @ params["w"]
        >>> weighted_gradient(f, {"w": torch.zeros(2)}, torch.eye(2), torch.tensor([3.0, 4.0]), None)
        {'w': tensor([3., 4.])}
    """
    check_weights(weights, length(U))
    if isinstance(params, ShardedTree):
        return gradient_in_shards(SortedBatch("U", U, f), params, weights, _walking(how))
    if group is None and not isinstance(how, Walking):
        with error_context("U"):
            return func.vjp(f, how)(params, U, weights)
    side, vector = _share(SortedBatch("U", U, f), group), dict[str, Tensor]()
    if len(side):
        vector = _own(side, params, U, weights, how)
    if group is None:
        return vector
    total: Tree = {}
    for names in in_buckets(params):  # one after the other, so that no second copy of all is made
        mine = [vector.pop(name) if vector else torch.zeros_like(widened(params[name].detach())) for name in names]
        total |= zip(names, all_sum(group, mine), strict=True)
    return total


def _walking(how: Walking | int | None) -> Walking:
    return how if isinstance(how, Walking) else Walking()


def _own(side: SortedBatch, params: Tree, U: Any, weights: Tensor, how: Walking | int | None) -> Tree:
    with error_context(side.name):
        if isinstance(how, Walking):
            return gradient_sum(side, params, widened(weights), how)
    with error_context(side.name, side.order):
        assert side.f is not None
        return func.vjp(side.f, how)(params, take(U, side.order), weights[side.order.to(weights.device)])


def along(f: Function, params: Tree, E: Any, vector: Tree, how: Walking | int, group: Group | None = None) -> Tensor:
    """Compute ⟨∇f, v⟩ of every sequence, [n] in the caller's order, holding one microbatch's handles at a time."""
    whole, like = SortedBatch("E", E, f), next(iter(vector.values()))
    side = _share(whole, group)
    total = torch.zeros(len(whole), dtype=torch.float64, device=like.device)
    if len(side):
        total.index_copy_(0, side.order.to(like.device), _products(side, params, vector, how).to(total))
    if group is not None:
        (total,) = all_sum(group, [total])
    return total.to(like.dtype)


def values(f: Function, params: Tree, E: Any, microbatch: int | None, group: Group | None = None) -> Tensor:
    """Compute f of a batch, [n] float64 in the caller's order, on every rank."""
    if group is None or isinstance(params, ShardedTree):
        return evaluated(f, params, E, microbatch)
    side = SortedBatch("E", E, f).every(group.size, group.rank)
    total = torch.zeros(length(E), dtype=torch.float64, device=next(iter(params.values())).device)
    if len(side):
        with error_context("E", side.order):
            own = evaluated(f, params, take(E, side.order), microbatch)
        total.index_copy_(0, side.order.to(total.device), own.to(total))
    return all_sum(group, [total])[0]


@public
def evaluated(f: Function, params: Tree, batch: Any, microbatch: int | None = None) -> Tensor:
    """Compute f of a batch, [n] float64: layer by layer if it is long and f can be cut, else by whole microbatches.

    Sums over tokens are kept in float64: the difference of f between two θ is far smaller than f. Where θ is in shards,
    all ranks compute it together.

    Example:
        >>> evaluated(lambda params, x: x @ params["w"], {"w": torch.ones(2)}, torch.eye(2))
        tensor([1., 1.], dtype=torch.float64)
    """
    if isinstance(params, ShardedTree):
        return values_in_shards(SortedBatch("E", batch, f), params, Walking())
    if how := walking_of(f, params, (batch,), None):
        return values_of(SortedBatch("E", batch, f), plain(params), params, how)
    return func.evaluate_in_float64(f, microbatch)(params, batch)


def _products(side: SortedBatch, params: Tree, vector: Tree, how: Walking | int) -> Tensor:
    """Compute ⟨∇f, v⟩ in sorted order."""
    if isinstance(how, Walking):
        return along_sorted(side, ((1.0, plain(params)),), params, vector, how)
    J = computed(side, ((1.0, params),), cuts_of(side, token_grant(side.batch, how)))
    products = torch.cat([along_direction(handles, vector) for _, handles in J])
    with error_context(side.name, side.order):
        check_values(products, "the influence")
    return products


def _share(side: SortedBatch, group: Group | None) -> SortedBatch:
    """Return every W-th sequence of a sorted batch, from this rank's on; all of them without a group."""
    return side if group is None else side.every(group.size, group.rank)
