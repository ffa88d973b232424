"""The contraction with layers outside: for long sequences, whose whole gradients have no room, and logits neither.

    for shard in (head and after, layer L, …, layer 1, before):  for block in U:  sums += products(J_E, J_U[block])

Both sides walk back one layer together (`fkernel.engine.by_layer`); there is one layer's gradients of a model at once,
all of E's and a block of U's. What is asked is the same as of whole sequences (`fkernel.engine.contraction`), and comes
in one block of rows at the end.
"""

from __future__ import annotations

from typing import Any

import torch

from fkernel import func
from fkernel.engine.by_layer import Side, shards
from fkernel.engine.contraction import Block, placed
from fkernel.engine.path import NODES, check_path
from fkernel.engine.planning.estimate import Walking, walking_of
from fkernel.engine.sides import Ordered, naming
from fkernel.errors import ModelError
from fkernel.func.contract import Asked, Own, Products
from fkernel.func.cutting import cut_of
from fkernel.func.held import weighted_sum
from fkernel.func.layers import Cut
from fkernel.func.objective import Function
from fkernel.func.source import Source, moved, plain
from fkernel.func.walk import Walk
from fkernel.shapes import Tensor, Tree


def must_cut(f: Function, params: Tree, batch: Any) -> Cut:
    """Cut a model at its layers.

    Raises:
        ModelError: it cannot be cut; the message says what stands against it.
    """
    found = cut_of(f, params, batch)
    if isinstance(found, str):
        raise ModelError(f"f cannot be computed layer by layer: {found}. Leave strategy= and memory= to the planner.")
    return found


def sources_of(path: str, params: Tree, step: Tree | None) -> tuple[tuple[float, Source], ...]:
    """Place the nodes of a step's path, their parameters made a layer at a time: (q_j, θ + s_jΔθ)."""
    check_path(path)
    if step is None:
        return ((1.0, plain(params)),)
    return tuple((q, plain(params) if s == 0 else moved(params, step, s)) for q, s in NODES[path])


def layered(
    E: Ordered, U: Ordered, nodes: tuple[tuple[float, Source], ...], params: Tree, asked: Asked, how: Walking
) -> Block:
    """Contract everything that is asked of two sides, layer by layer.

    Args:
        E: the rows.
        U: the columns; E itself where the two are one.
        nodes: where E's gradients are taken, (q_j, source).
        params: θ, where U's are.
        asked: what is asked; x is E, y is U.
        how: blocks, and how many layer inputs are kept.

    Returns:
        One block, of all rows.
    """
    at_U = nodes[0][1] if U is E else plain(params)
    assert E.f is not None
    assert U.f is not None
    of_U, of_E = must_cut(U.f, params, U.batch), must_cut(E.f, params, E.batch)
    columns = Side(U.batch, ((1.0, at_U),))
    rows_ = columns if U is E and len(nodes) == 1 else Side(E.batch, nodes, of_E)
    walking = shards(of_U, rows_, columns, every=how.every, tokens=how.tokens, dense=not how.tokens)
    products: Products | None = None
    for shard in walking:
        for k, (rows, handles) in enumerate(shard.U):
            if products is None:
                products = Products(asked, len(E), len(U), E.order.device)
            products.add(shard.E, handles, rows, own_x=k == 0)
    assert products is not None
    return placed(E.order, U.order, products)


def along_of(
    side: Ordered, nodes: tuple[tuple[float, Source], ...], params: Tree, vector: Tree, how: Walking
) -> Tensor:
    """Compute ⟨ḡ, v⟩ of every sequence layer by layer, [n] float64 in the caller's order; ḡ = Σ_j q_j ∇f(θ_j)."""
    products = Products(Asked(x=Own({"along": vector})), len(side), 0, side.order.device)
    for q, source in nodes:
        for rows, handles in _walk(side, source, params, how, q).back():
            products.add(handles, handles, rows=rows, own_y=False)
    found = products.whole("x", "along")
    return torch.empty_like(found).index_copy_(0, side.order, found)


def gradient_sum(side: Ordered, params: Tree, weights: Tensor, how: Walking) -> Tree:
    """Compute Jᵀw layer by layer, {name: [*shape]}; w in the caller's order."""
    walk, w, total = _walk(side, plain(params), params, how), weights[side.order], dict[str, Tensor]()
    for rows, handles in walk.back():
        for name, leaf in weighted_sum(handles, w[rows].to(walk.values)).items():
            total[name] = total[name].add_(leaf) if name in total else leaf
    return {name: total[name] for name in params}


def values_of(side: Ordered, source: Source, params: Tree, how: Walking) -> Tensor:
    """Compute f of a side, [n] in the caller's order; no more than one layer's input of each sequence is held."""
    walk = _walk(side, source, params, how._replace(every=1 << 30))
    return torch.empty_like(walk.values).index_copy_(0, side.order, walk.values)


def evaluated(f: Function, params: Tree, batch: Any, microbatch: int | None = None) -> Tensor:
    """Compute f of a batch, [n]: layer by layer where it is long and f can be cut, whole microbatches otherwise."""
    if how := walking_of(f, params, (batch,), None):
        return values_of(Ordered("E", batch, f), plain(params), params, how)
    return func.evaluate(f, microbatch)(params, batch)


def _walk(side: Ordered, source: Source, params: Tree, how: Walking, weight: float = 1.0) -> Walk:
    assert side.f is not None
    with naming(side.name, side.order):
        cut = must_cut(side.f, params, side.batch)
        return Walk(cut, source, side.batch, weight=weight, every=how.every, tokens=how.tokens)
