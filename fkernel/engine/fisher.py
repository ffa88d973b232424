"""K_EU = J_E P J_Uᵀ, streamed, and K_EU A without K.

    kernel      K[e, u] = ⟨∇f(e), P ∇f(u)⟩           per-sequence gradients of both sides, contracted
    influence   K A = J_E (P (J_Uᵀ A))              one vjp over U, one transform, one jvp over E

P stands between the two gradients once. Rows are E, columns are U.

One side's gradients are held, as handles (`fkernel.func.handles`) or written out, and the other side's stream past
them a block at a time; a diagonal P is multiplied into the shards of their contraction, any other P is applied to
dense rows of U. `fkernel.engine.planning.strategy` has the ways to do this under a memory grant.

Source: the kernel is the Fisher kernel of T. Jaakkola & D. Haussler (1998), with the optimizer's diagonal in place of
the inverse Fisher matrix; for f = log π and P = I it is the neural tangent kernel of A. Jacot et al. (2018).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fkernel import func, tree
from fkernel.engine.budget import parse_bytes
from fkernel.engine.planning import Strategy, choose, usual_microbatch
from fkernel.engine.planning.passes import fit, forward, reverse
from fkernel.engine.recycling import recycled
from fkernel.engine.sides import (
    Ordered,
    Pieces,
    blocks,
    check_sides,
    cuts_of,
    gathered,
    naming,
    pieces_of,
    rows_under,
    transformed,
    written_out,
)
from fkernel.engine.spilled import spilled
from fkernel.errors import BatchError
from fkernel.func.boundary import explained
from fkernel.func.certified import plan_of
from fkernel.func.handles import packed
from fkernel.func.objective import Function
from fkernel.precond import Diagonal, Preconditioner
from fkernel.shapes import Tensor, Tree


def kernel(
    f: Function,
    params: Tree,
    E: Any,
    U: Any,
    precond: Preconditioner,
    *,
    memory: int | str | None = None,
    microbatch: int | None = None,
    strategy: Strategy | None = None,
    store: Path | str | None = None,
    rows: Function | None = None,
) -> Tensor:
    """Compute the kernel between two batches.

    K[e, u] = ⟨∇f(e; θ), P ∇f(u; θ)⟩

    Args:
        f: (params, batch) -> [n], such as `func.sequence_logprob(apply)`.
        params: {name: tensor}, θ.
        E: the evaluation batch, n_E sequences (the rows).
        U: the update batch, n_U sequences (the columns).
        precond: P, any linear map tree → tree; it is given rows {name: [n, *shape]} of U's gradients.
        memory: a promise, in bytes or as "8GiB": gradients, activations, contraction and result stay below it, beside
            the model, P and the batches; the fastest strategy that keeps it is chosen (`fkernel.estimate` tells which,
            and what it will take). None holds the smaller side's handles whole.
        microbatch: sequences of the greatest length under way at once, and so many tokens of shorter ones; None:
            eight, or as many as have 1024 tokens. A grant may lower it.
        strategy: how to compute it, instead of choosing; such as `fkernel.estimate(...).chosen.strategy`.
        store: a directory for gradients on disk. With one, the strategy "store" is open to choice; gradients that it
            holds from an earlier call (of the same f, θ, batch and microbatches) are read, not computed. Each batch
            has a folder of its own there, to be deleted when it is wanted no more.
        rows: f of E, where it is another than U's: an observable, or `func.through_detach(f)`.

    Returns:
        [n_E, n_U] in the parameters' dtype; positive where u's gradient raises f of e. Units: f², times P's.

    Raises:
        BatchError, TreeError, ModelError, NonFiniteError: the inputs are at fault, or a gradient is not finite; a row
            in the message counts within the batch that it names.

    Example:
        >>> import torch
        >>> from fkernel import precond
        >>> f = lambda params, x: x @ params["w"]
        >>> kernel(f, {"w": torch.zeros(2)}, torch.eye(2), torch.ones(3, 2), precond.identity())
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """
    f_E = f if rows is None else rows
    check_sides(f, params, E, U, f_E)
    microbatch = usual_microbatch(microbatch, E, U)
    with explained(params):
        plan, plan_E = plan_of(f, params, U), plan_of(f_E, params, E)
    promised = memory is not None or strategy is not None
    if strategy is None:
        dense_U = not isinstance(precond, Diagonal)
        strategy = choose(f, params, E, U, plan, memory, microbatch, dense_U, store is not None)
    side_E = Ordered("E", E, f_E, plan_E)
    side_U = side_E if E is U and f_E is f and isinstance(precond, Diagonal) else Ordered("U", U, f, plan)
    with recycled():
        return _executed(strategy, params, side_E, side_U, precond, store, promised)


def _executed(
    strategy: Strategy,
    params: Tree,
    side_E: Ordered,
    side_U: Ordered,
    precond: Preconditioner,
    store: Path | str | None,
    promised: bool,
) -> Tensor:
    if strategy.name == "store":
        K = spilled(strategy, params, side_E, side_U, precond, _given(store))
    else:
        K = _streamed(strategy, params, side_E, side_U, precond, promised)
    # K has the sides' own orders: put rows and columns back where the caller has them.
    return K[side_E.order.argsort()][:, side_U.order.argsort()].to(next(iter(params.values())).dtype)


def _streamed(
    strategy: Strategy,
    params: Tree,
    E: Ordered,
    U: Ordered,
    precond: Preconditioner,
    promised: bool,
) -> Tensor:
    """Compute K with tiles of one side held in memory, [n_E, n_U] in the sides' own orders.

    What is held lies among the temporaries of the passes, and holes between them are memory too. Where memory was
    promised it is moved together, which costs a copy.
    """
    held, streamed = (E, U)[:: 1 if strategy.held == "E" else -1]
    D = precond.d if isinstance(precond, Diagonal) else None
    K = next(iter(params.values())).new_empty(len(held), len(streamed))

    def source(side: Ordered) -> tuple[list[slice], Pieces]:
        cuts = cuts_of(side, strategy.tokens)
        pieces = pieces_of(params, side, cuts)
        if side is U and not isinstance(precond, Diagonal):
            return cuts, rows_under(precond, pieces, params, side, cuts)
        return cuts, (lambda i: packed(pieces(i))) if promised else pieces

    cuts_h, pieces_h = source(held)
    cuts_s, pieces_s = source(streamed)
    for tile in blocks(held, cuts_h, strategy.tile):
        rows = slice(cuts_h[tile[0]].start, cuts_h[tile[-1]].stop)
        J = written_out(pieces_h, tile, cuts_h, params) if strategy.dense else gathered(pieces_h, tile)
        if E is U and len(tile) == len(cuts_h):
            K[:] = func.contract(J, J, diagonal=D)
            break
        for block in blocks(streamed, cuts_s, strategy.block):
            columns = slice(cuts_s[block[0]].start, cuts_s[block[-1]].stop)
            K[rows, columns] = func.contract(J, gathered(pieces_s, block), diagonal=D)
        del J  # or it would be alive while the next tile is made
    return K if held is E else K.T.contiguous()


def _given(store: Path | str | None) -> Path | str:
    if store is None:
        raise BatchError('The strategy "store" keeps gradients on disk; say where: store="directory".')
    return store


def influence(
    f: Function,
    params: Tree,
    E: Any,
    U: Any,
    precond: Preconditioner,
    weights: Tensor,
    *,
    memory: int | str | None = None,
    microbatch: int | None = None,
) -> Tensor:
    """Compute what a weighted update batch does to every sequence of E, without any per-sequence gradient.

    K_EU w = J_E (P (J_Uᵀ w))

    Args:
        f: (params, batch) -> [n].
        params: {name: tensor}, θ.
        E: the evaluation batch, n_E sequences.
        U: the update batch, n_U sequences.
        precond: P, any linear map tree → tree; it is given one tree {name: [*shape]}.
        weights: [n_U]; for a policy gradient, c·w_u·A_u.
        memory: a promise, in bytes or as "8GiB": three vectors of the parameters' size and a microbatch's activations
            stay below it, beside the model, P and the batches. It lowers the microbatch as far as it must.
        microbatch: as in `kernel`.

    Returns:
        [n_E]; equals `kernel(...) @ weights`. The peak memory does not depend on n_U.

    Raises:
        As `kernel`.

    Example:
        >>> import torch
        >>> from fkernel import precond
        >>> f = lambda params, x: x @ params["w"]
        >>> influence(f, {"w": torch.zeros(2)}, torch.eye(2), torch.ones(3, 2), precond.identity(), torch.ones(3))
        tensor([3., 3.])
    """
    check_sides(f, params, E, U)
    microbatch = usual_microbatch(microbatch, E, U)
    m, needed = fit(memory, microbatch, f, params, (E, U), (reverse, forward), vectors=1, least=3)
    if memory is not None and parse_bytes(memory) < needed:
        raise BatchError(
            f"memory={memory!r} cannot hold three vectors of {tree.size(params)} parameters, and one sequence's "
            f"activations; give at least {needed} bytes, or shorten the sequences."
        )
    with recycled():
        with naming("U"):
            towards = func.vjp(f, m)(params, U, weights)
        move = transformed(precond, towards)
        del towards
        with naming("E"):
            return func.jvp(f, m)(params, E, move)
