"""K_EU = J_E P J_Uᵀ, streamed, and K_EU A without K.

    kernel      K[e, u] = ⟨∇f(e), P ∇f(u)⟩           per-sequence gradients of both sides, contracted
    influence   K A = J_E (P (J_Uᵀ A))              one vjp over U, one transform, ⟨∇f(e), ·⟩ over E

P is applied once, between the two gradients. Rows are E, columns are U.

One batch's gradients are held, as handles (`fkernel.func.handles.forms`) or written out, and the other batch's stream
past them a block at a time; a diagonal P is multiplied in during the contraction, any other P is applied to dense rows
of U. `fkernel.engine.planning.strategy` has the strategies within a memory budget.

Source: the kernel is the Fisher kernel of T. Jaakkola & D. Haussler (1998), with the optimizer's diagonal in place of
the inverse Fisher matrix; for f = log π and P = I it is the neural tangent kernel of A. Jacot et al. (2018).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fkernel import tree
from fkernel.boundary import public
from fkernel.distributed import Group, ShardedTree
from fkernel.engine.batching import SortedBatch, check_sides, error_context, transformed
from fkernel.engine.layerwise import Walking
from fkernel.engine.over_ranks import over, ranks_of
from fkernel.engine.params_in_shards import agreed_params, own_preconditioner
from fkernel.engine.planning import Strategy, choose, usual_microbatch
from fkernel.engine.planning.estimates import walking_of
from fkernel.engine.planning.passes import max_microbatch, reverse
from fkernel.engine.problem import Problem, blocks
from fkernel.engine.recycling import kept_or_returned
from fkernel.engine.sums import along, weighted_gradient
from fkernel.errors import BatchError
from fkernel.func.handles import ProductSpec, RowSpec
from fkernel.func.inputs import Function, bare, computed_like, translate_errors
from fkernel.func.taps import handles_of
from fkernel.func.trust import plan_of
from fkernel.io import parse_bytes
from fkernel.precond import Diagonal, Preconditioner
from fkernel.shapes import Tensor, Tree


@public
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
    mesh: Any = None,
) -> Tensor:
    """Compute the kernel between two batches.

    K[e, u] = ⟨∇f(e; θ), P ∇f(u; θ)⟩

    Args:
        f: (params, batch) -> [n], such as `func.sequence_logprob(apply)`.
        params: {name: tensor}, θ. With a mesh they may be in shards: `DTensor`s, as those of an FSDP2 model, or this
            rank's part of `fkernel.distributed.shard_tree`; a rank then gathers one layer at a time, f is one of a
            model made within `func.without_weights`, and P is in shards or whole.
        E: the evaluation batch, n_E sequences (the rows).
        U: the update batch, n_U sequences (the columns).
        precond: P, any linear map tree → tree; it is given rows {name: [n, *shape]} of U's gradients.
        memory: budget in bytes or as "8GiB" for gradients, activations, contraction and result, in addition to the
            model, P and the batches; the fastest strategy within it is chosen (`fkernel.estimate` shows which, and its
            cost). None: no limit, the smaller batch's handles are all held.
        microbatch: sequences of the greatest length in one pass, and as many tokens of shorter ones; None: eight, or
            as many as have 1024 tokens. A memory budget may lower it.
        strategy: how to compute it, instead of choosing; such as `fkernel.estimate(...).chosen.strategy`.
        store: a directory for gradients on disk. It makes the strategy "store" available; gradients that it holds
            from an earlier call (of the same f, θ, batch and microbatches) are read, not computed. Each batch has its
            own folder there, which may be deleted when no longer needed.
        rows: f of E, where it differs from U's: an observable, or `func.through_detach(f)`.
        mesh: a one-dimensional `torch.distributed.DeviceMesh`: its ranks, each with the same arguments, compute the
            result together, and each has it. Sequences are split over them (`fkernel.engine.over_ranks`). `memory` is
            then each rank's.

    Returns:
        [n_E, n_U] in the parameters' dtype; positive where u's gradient raises f of e. Units: f², times P's.

    Raises:
        BatchError, TreeError, ModelError, NonFiniteError: invalid input, or a gradient is not finite; row numbers
            in messages count within the batch that is named.
        ProcessError: with a mesh, ranks were given different things, or one of them failed, stopped or hangs.

    Example:
        >>> import torch
        >>> from fkernel import precond
        >>> f = lambda params, x: x @ params["w"]
        >>> kernel(f, {"w": torch.zeros(2)}, torch.eye(2), torch.ones(3, 2), precond.identity())
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """
    plan = [str(each) for each in (memory, microbatch, strategy)]
    given = {"E": E, "U": U, "memory, microbatch and strategy": plan}
    with over(mesh, "kernel", given) as group:
        θ = agreed_params(f, params, group)
        P = own_preconditioner(precond, θ, group)
        return _kernel(f, θ, E, U, P, memory, microbatch, strategy, store, rows, group)


def _kernel(
    f: Function,
    params: Tree,
    E: Any,
    U: Any,
    precond: Preconditioner,
    memory: int | str | None,
    microbatch: int | None,
    strategy: Strategy | None,
    store: Path | str | None,
    rows: Function | None,
    group: Group | None,
) -> Tensor:
    f_E = f if rows is None else rows
    check_sides(f, params, E, U, f_E, layers=True)
    diagonal = isinstance(precond, Diagonal)
    D = precond.d if isinstance(precond, Diagonal) else None
    if D is not None:
        tree.check_names(params, D, "the tree to precondition", "the preconditioner")
    size = usual_microbatch(microbatch, E, U)
    how = strategy or choose(f, params, E, U, memory, size, not diagonal, store is not None, ranks=ranks_of(group))
    side_E = SortedBatch("E", E, f_E)
    side_U = side_E if E is U and f_E is f and diagonal else SortedBatch("U", U, f)
    promised = memory is not None or strategy is not None
    P = None if diagonal else precond
    spec, sharded = ProductSpec({"": D}), isinstance(params, ShardedTree)
    problem = Problem(params, side_E, side_U, spec, P=P, store=store, promised=promised, group=group, sharded=sharded)
    K = torch.empty(len(side_E), len(side_U), dtype=torch.float64, device="cpu")
    with kept_or_returned(group):
        for block in blocks(problem, how):
            K[block.at] = block.kernel()
    leaf = computed_like(params)
    return K.to(leaf.device, leaf.dtype)


@public
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
    mesh: Any = None,
) -> Tensor:
    """Compute the effect of a weighted update batch on every sequence of E, without per-sequence gradients of U.

    K_EU w = J_E (P (J_Uᵀ w))

    Args:
        f: (params, batch) -> [n].
        params: {name: tensor}, θ.
        E: the evaluation batch, n_E sequences.
        U: the update batch, n_U sequences.
        precond: P, any linear map tree → tree; it is given one tree {name: [*shape]}.
        weights: [n_U]; for a policy gradient, c·w_u·A_u.
        memory: budget in bytes or as "8GiB" for three vectors of the parameters' size and a microbatch's activations,
            in addition to the model, P and the batches. The microbatch is lowered to fit it.
        microbatch: as in `kernel`.
        mesh: as in `kernel`.

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
    given = {"E": E, "U": U, "weights": weights, "memory and microbatch": [str(memory), microbatch]}
    with over(mesh, "influence", given) as group:
        θ = agreed_params(f, params, group)
        P = own_preconditioner(precond, θ, group) if isinstance(θ, ShardedTree) else precond
        check_sides(f, θ, E, U, layers=True)
        how, m = _passes(f, θ, E, U, memory, usual_microbatch(microbatch, E, U))
        with kept_or_returned(group):
            towards = weighted_gradient(f, θ, U, weights, how or m, group)
            move = transformed(P, towards)
            del towards
            if isinstance(θ, ShardedTree):
                return _along_in_shards(f, θ, E, move, how)
            return along(f, θ, E, move, how or m, group)


def _along_in_shards(f: Function, params: ShardedTree, E: Any, move: Tree, how: Walking | None) -> Tensor:
    """Compute ⟨∇f, v⟩ of every sequence, [n] in the caller's order; v is this rank's shard."""
    side, how = SortedBatch("E", E, f), how or Walking()
    spec = ProductSpec(x=RowSpec({"along": move}))
    problem = Problem(params, side, None, spec, group=params.group, sharded=True)
    result = torch.empty(len(side), dtype=torch.float64, device="cpu")
    for block in blocks(problem, Strategy("layers", "E", None, None, how.tokens, how.every)):
        result[block.at] = block.rows("along")
    leaf = computed_like(params)
    return result.to(leaf.device, leaf.dtype)


def _passes(
    f: Function, params: Tree, E: Any, U: Any, memory: int | str | None, microbatch: int
) -> tuple[Walking | None, int]:
    """Plan the passes of `influence` within a budget: a walk by layers where sequences are long; a microbatch."""
    if how := walking_of(f, params, (E, U), memory):
        return how, microbatch
    with error_context("E"), translate_errors(params):
        plan = plan_of(f, params, E)

    def factors(f: Function, params: Tree, batch: Any) -> Any:
        return handles_of(bare(f), params, batch, plan)

    m, needed = max_microbatch(memory, microbatch, f, params, (E, U), (reverse, factors), vectors=1, least=3)
    if memory is not None and parse_bytes(memory) < needed:
        raise BatchError(
            f"memory={memory!r} cannot hold three vectors of {tree.size(params)} parameters, and one sequence's "
            f"activations; give at least {needed} bytes, or shorten the sequences."
        )
    return None, m
