"""The contraction with layers as the outer loop, for long sequences whose whole gradients and logits do not fit.

    for tile in held:  for block in streamed:
        for shard in (head and after, layer L, …, layer 1, before):
            for u in block:  sums += products(J_held[tile, shard], J_streamed[u, shard])

Both batches run their backward passes together, layer by layer (`fkernel.engine.by_layer`), and again for every tile
or block of the other; memory holds one layer's gradients, of a tile and of a few sequences of a block. Products and
blocks of rows are those of `fkernel.engine.streaming`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fkernel import tree
from fkernel.boundary import public
from fkernel.distributed import ShardedTree
from fkernel.engine.batching import SortedBatch, error_context
from fkernel.engine.by_layer import Side, shards
from fkernel.engine.path import NODES, check_path
from fkernel.engine.planning.estimates import Walking
from fkernel.engine.planning.walking import tiles_of
from fkernel.engine.planning.workloads import LONG
from fkernel.engine.progress import part_done
from fkernel.engine.streaming import KernelBlock, arranged
from fkernel.errors import ModelError
from fkernel.func.handles import Handles, Products, ProductSpec, RowSpec, weighted_sum
from fkernel.func.inputs import Function, Source, computed_like, moved, plain, take, trim
from fkernel.func.layers import Cut, Walk, cut_of
from fkernel.shapes import Tensor, Tree

ALONE = "Leave strategy= and memory= to the planner."
WHOLE = "params are in shards, so that it has to be. Give them whole: leaf.full_tensor() of a DTensor."


def must_cut(f: Function, params: Tree, batch: Any) -> Cut:
    """Cut a model at its layers.

    Raises:
        ModelError: it cannot be cut; the message says why.
    """
    cut = cut_of(f, params, batch)
    if isinstance(cut, str):
        raise ModelError(
            f"f cannot be computed layer by layer: {cut}. {WHOLE if isinstance(params, ShardedTree) else ALONE}"
        )
    return cut


def sources_of(path: str, params: Tree, step: Tree | None) -> tuple[tuple[float, Source], ...]:
    """Return the nodes of a step's path, (q_j, θ + s_jΔθ), whose parameters are formed a layer at a time."""
    check_path(path)
    if step is None:
        return ((1.0, plain(params)),)
    return tuple((q, plain(params) if s == 0 else moved(params, step, s)) for q, s in NODES[path])


def layered(
    E: SortedBatch,
    U: SortedBatch | None,
    nodes: tuple[tuple[float, Source], ...],
    params: Tree,
    spec: ProductSpec,
    how: Walking,
    *,
    held: str = "E",
    tile: int | None = None,
    block: int | None = None,
) -> Iterator[KernelBlock]:
    """Compute all products of `spec` between two batches, layer by layer.

    Args:
        E: the rows.
        U: the columns; E itself for a kernel with itself; None for products of rows alone.
        nodes: where E's gradients are taken, (q_j, source).
        params: θ, where U's are.
        spec: the products to compute; x is E, y is U.
        how: sizes of blocks, and which layer inputs are kept.
        held: the batch whose gradients of a layer are held while the other's stream past, "E" or "U".
        tile: tokens of it that are held at a time; None for all.
        block: tokens of the other batch that are processed beside them; None for all. Each batch is recomputed for
            every part of the other.

    Yields:
        One `KernelBlock` a tile of E; one in all where U is held.
    """
    assert E.f is not None
    if U is None:
        yield from arranged(E, None, spec, "E", lambda own: _alone(E, nodes, params, own, how, tile))
        return
    assert U.f is not None
    at_U = nodes if U is E and len(nodes) == 1 else ((1.0, plain(params)),)
    columns = Side(U.batch, at_U, must_cut(U.f, params, U.batch))
    rows = columns if U is E and len(nodes) == 1 else Side(E.batch, nodes, must_cut(E.f, params, E.batch))
    (own, x), (others, y) = ((E, rows), (U, columns)) if held == "E" else ((U, columns), (E, rows))

    def walk(spec: ProductSpec) -> Iterator[tuple[slice, Products]]:
        for some in tiles_of(own.tokens, tile):
            products = Products(spec, some.stop - some.start, len(others), own.order.device)
            for passing in tiles_of(others.tokens, block):
                _contract(_part(x, some, len(own)), _part(y, passing, len(others)), products, passing.start, how)
            yield some, products

    yield from arranged(E, U, spec, held, walk)


def _alone(
    E: SortedBatch,
    nodes: tuple[tuple[float, Source], ...],
    params: Tree,
    spec: ProductSpec,
    how: Walking,
    tile: int | None,
) -> Iterator[tuple[slice, Products]]:
    """Process one tile of rows after the other, with all nodes together, since the products may not be linear."""
    assert E.f is not None
    side = Side(E.batch, nodes, must_cut(E.f, params, E.batch))
    assert side.cut is not None
    for some in tiles_of(E.tokens, tile):
        products = Products(spec, some.stop - some.start, 0, E.order.device)
        part = _part(side, some, len(E))
        for shard in shards(side.cut, part, part, every=how.every, tokens=how.tokens, dense=not how.tokens):
            products.add(shard.held, shard.held, own_y=False)
            part_done()
        yield some, products


def _part(side: Side, rows: slice, n: int) -> Side:
    """Return some sequences of a batch; the batch itself, where they are all of its n."""
    return side if rows == slice(0, n) else side._replace(batch=trim(take(side.batch, rows)))


def _contract(x: Side, y: Side, products: Products, start: int, how: Walking) -> None:
    """Hold x's gradients of a layer and contract y's with them, which are the columns from `start` on."""
    assert y.cut is not None
    for shard in shards(y.cut, x, y, every=how.every, tokens=how.tokens, dense=not how.tokens):
        for k, (rows, handles) in enumerate(shard.streamed):
            columns = slice(start + rows.start, start + rows.stop)
            products.add(shard.held, handles, columns, own_x=k == 0 and start == 0)
            del handles  # frees them before the next are computed
            part_done()
        del shard  # its storage is free once the layers are done


def along_of(
    side: SortedBatch, nodes: tuple[tuple[float, Source], ...], params: Tree, vector: Tree, how: Walking
) -> Tensor:
    """Compute ⟨ḡ, v⟩ of every sequence layer by layer, [n] float64 in the caller's order; ḡ = Σ_j q_j ∇f(θ_j)."""
    values = along_sorted(side, nodes, params, vector, how)
    return torch.empty_like(values).index_copy_(0, side.order, values)


def along_sorted(
    side: SortedBatch, nodes: tuple[tuple[float, Source], ...], params: Tree, vector: Tree, how: Walking
) -> Tensor:
    """Compute the same in sorted order."""
    products = Products(ProductSpec(x=RowSpec({"along": vector})), len(side), 0, side.order.device)
    for q, source in nodes:
        for start, walk in _walks(side, source, params, how, weight=q):
            for some, handles in walk.back():
                rows = slice(start + some.start, start + some.stop)
                products.add(handles, handles, rows=rows, own_y=False)
                part_done()
    return products.whole("x", "along")


@public
def gradient_sum(
    side: SortedBatch,
    params: Tree,
    weights: Tensor,
    how: Walking,
    of: Callable[[Handles, Tensor], Tree] = weighted_sum,
    on_progress: Callable[[int], Any] = lambda n: None,
) -> Tree:
    """Compute Jᵀw layer by layer, {name: [*shape]}; sequences of weight 0 are skipped.

    Args:
        side: the sorted batch, with its f.
        params: θ.
        weights: [n] in the caller's order.
        how: block size and checkpointing of layer inputs.
        of: another sum over sequences, of handles and weights: `func.squared_sum`.
        on_progress: called with the number of sequences after each group of them.

    Example:
        >>> from fkernel import func
        >>> from fkernel.engine import SortedBatch
        >>> from fkernel.engine.planning.estimates import Walking
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> shape = {"vocab_size": 11, "n_positions": 8, "n_embd": 4, "n_layer": 2, "n_head": 1}
        >>> apply, params = func.make_functional(GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)))
        >>> S, batch = func.sequence_logprob(apply), func.pad([[1, 2], [3]], [[4], [5]])
        >>> J_w = gradient_sum(SortedBatch("U", batch, S), params, torch.ones(2), Walking())
        >>> sorted(J_w) == sorted(params)
        True
    """
    total: dict[str, Tensor] = {}
    w = weights[side.order.to(weights.device)].to(computed_like(params))
    for start, walk in _walks(side, plain(params), params, how, w):
        for some, handles in walk.back():
            for name, leaf in of(handles, w[start + some.start : start + some.stop]).items():
                total[name] = total[name].add_(leaf) if name in total else leaf
        on_progress(len(walk.values))
    tree.check_finite(total, "the weighted sum of gradients")
    return {name: total[name] for name in params}


def values_of(side: SortedBatch, source: Source, params: Tree, how: Walking) -> Tensor:
    """Compute f of a batch, [n] float64 in the caller's order, holding one layer's input of each sequence."""
    walks = _walks(side, source, params, how._replace(every=1 << 30))
    values = torch.cat([walk.values for _, walk in walks])
    return torch.empty_like(values).index_copy_(0, side.order, values)


def _walks(
    side: SortedBatch, source: Source, params: Tree, how: Walking, weights: Tensor | None = None, weight: float = 1.0
) -> Iterator[tuple[int, Walk]]:
    """Iterate over groups of sequences: (row of the first one, their walk).

    Groups whose weights are all 0 are skipped, except the first, which gives zeros their shapes.
    """
    assert side.f is not None
    with error_context(side.name):
        cut = must_cut(side.f, params, side.batch)
    calls: dict[Any, Any] = {}
    for rows in tiles_of(side.tokens, max(LONG, how.tokens)):
        if weights is None or not rows.start or bool(weights[rows].any()):
            with error_context(side.name, side.order[rows]):
                part = side.batch if rows == slice(0, len(side)) else trim(take(side.batch, rows))
                walk = Walk(cut, source, part, weight=weight, every=how.every, tokens=how.tokens, calls=calls)
            yield rows.start, walk
