"""The inputs of a contraction: two batches, the path of a step, and the products to compute.

`blocks` runs it by the chosen strategy; everything in the package that contracts gradients goes through it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fkernel.boundary import public
from fkernel.distributed import Group
from fkernel.engine.batching import SortedBatch, cuts_of, error_context, transformed
from fkernel.engine.from_store import kernel_from_store
from fkernel.engine.gradients import Gradients, computed
from fkernel.engine.layerwise import Walking, layered, sources_of
from fkernel.engine.layerwise_over_ranks import layered_over_ranks
from fkernel.engine.over_ranks import held_shards, ranked, sharded_spec, summed
from fkernel.engine.path import nodes_of
from fkernel.engine.planning import Strategy
from fkernel.engine.streaming import KernelBlock, contraction
from fkernel.errors import BatchError
from fkernel.func.handles import Handles, ProductSpec, write_out
from fkernel.func.inputs import check_params, is_half, translate_errors
from fkernel.precond import Preconditioner
from fkernel.shapes import Tree


@dataclass(frozen=True, eq=False)
class Problem:
    """Two batches and the products of their gradients to compute.

    Attributes:
        params: θ.
        E: the rows, sorted, with their f.
        U: the columns; E itself for a kernel with itself, None for products of rows alone.
        spec: the products to compute; x is E, y is U.
        path: where E's gradients are evaluated; of `fkernel.engine.path.NODES`.
        step: Δθ; None for no step.
        kept: U's gradients, where they are already in memory or on disk.
        P: a non-diagonal preconditioner, applied to U's rows; None where `spec` holds a diagonal one.
        store: a directory for the gradients of both sides.
        promised: whether a memory budget was given.
        group: the ranks that compute it together, all with the same problem; None for this process alone.
        sharded: whether the vectors of `spec` are this rank's shards already.
    """

    params: Tree
    E: SortedBatch
    U: SortedBatch | None
    spec: ProductSpec
    path: str = "start"
    step: Tree | None = None
    kept: Gradients | None = None
    P: Preconditioner | None = None
    store: Path | str | None = None
    promised: bool = False
    group: Group | None = None
    sharded: bool = False


@public
def blocks(problem: Problem, strategy: Strategy) -> Iterator[KernelBlock]:
    """Run a problem by a strategy of `fkernel.engine.planning.strategy`; all give the same numbers.

    Yields:
        A `KernelBlock` a tile of E's rows.

    Example:
        >>> import torch
        >>> from fkernel.engine import Strategy
        >>> params, side = {"w": torch.ones(2)}, SortedBatch("U", torch.eye(2), lambda params, x: x @ params["w"])
        >>> problem = Problem(params, side, side, ProductSpec({"": None}))
        >>> [block.kernel().tolist() for block in blocks(problem, Strategy("sequences", "E", None, None, None))]
        [[[1.0, 0.0], [0.0, 1.0]]]
    """
    if strategy.name == "layers":
        if problem.P is not None:
            raise BatchError(
                'The strategy "layers" has no whole gradient, and a P that is no diagonal needs whole gradients.'
            )
        sources = sources_of(problem.path, problem.params, problem.step)
        how = Walking(strategy.tokens or 0, strategy.every)
        if (group := problem.group) is not None:
            own = problem.spec if problem.sharded else sharded_spec(problem.spec, group)
            sides = problem.E, problem.U, sources, problem.params, own
            yield from layered_over_ranks(*sides, how, group, **strategy.loops)
            return
        yield from layered(problem.E, problem.U, sources, problem.params, problem.spec, how, **strategy.loops)
        return
    if is_half(problem.params):
        check_params(problem.params)  # raises: only "layers" accepts half precision
    if problem.group is not None:
        yield from _over_ranks(problem, strategy, problem.group)
        return
    with ExitStack() as opened:
        E, U = _sources(problem, strategy, opened)
        yield from contraction(E, U, problem.spec, **strategy.loops)


def _over_ranks(problem: Problem, strategy: Strategy, group: Group) -> Iterator[KernelBlock]:
    """Compute shares of the sequences on every rank, exchange their gradients, and sum the products of all shards."""
    params, held, tile = problem.params, strategy.held, strategy.tile
    nodes = nodes_of(problem.path, params, problem.step)
    if strategy.name == "store":
        raise BatchError('The strategy "store" is for one process; leave store= and strategy= out beside a mesh.')
    tokens, promised = strategy.tokens, problem.promised
    change = None if problem.P is None else partial(_under, problem.P, params=params)
    E = ranked(problem.E, nodes, tokens, group, params, promised)
    U, same = problem.kept, problem.U is not None and problem.U is problem.E
    if U is None and problem.U is not None:
        U = E if same else ranked(problem.U, ((1.0, params),), tokens, group, params, promised, change)
    if problem.kept is None and U is not None and held == "U":
        U = held_shards(U, tile, group, params)
        E = U if same and tile is None else E
    else:
        E = E if problem.kept is not None and held == "U" else held_shards(E, tile, group, params)
        U = E if same and tile is None else U
    # One round of the streamed batch at a time: its parameters are exchanged one after the other.
    spec = problem.spec if problem.sharded else sharded_spec(problem.spec, group)
    for block in contraction(E, U, spec, held=held, tile=tile, block=1):
        yield summed(block, group)


def held_gradients(
    side: SortedBatch, params: Tree, strategy: Strategy, promised: bool, group: Group | None
) -> Gradients:
    """Compute and hold one batch's gradients at θ: whole, or on several ranks in shards."""
    nodes = ((1.0, params),)
    if group is not None:
        return held_shards(ranked(side, nodes, strategy.tokens, group, params, promised), None, group, params)
    return computed(side, nodes, cuts_of(side, strategy.tokens), promised).in_memory(together=promised)


def _sources(problem: Problem, strategy: Strategy, opened: ExitStack) -> tuple[Gradients, Gradients | None]:
    """Return both batches' gradients: computed on demand, kept, or from a store."""
    nodes = nodes_of(problem.path, problem.params, problem.step)

    def source(side: SortedBatch, at: Any) -> Gradients:
        cuts = cuts_of(side, strategy.tokens)
        if strategy.name == "store":
            if problem.store is None:
                raise BatchError('The strategy "store" keeps gradients on disk; say where: store="directory".')
            return opened.enter_context(kernel_from_store(problem.store, problem.params, side, cuts))
        return computed(side, at, cuts, problem.promised)

    E = source(problem.E, nodes)
    if problem.U is None or problem.U is problem.E:
        return E, None if problem.U is None else E
    U = problem.kept or source(problem.U, ((1.0, problem.params),))
    return E, U if problem.P is None else _under(problem.P, U, problem.params)


def _under(P: Preconditioner, J: Gradients, params: Tree) -> Gradients:
    """Write gradients out and apply P, an arbitrary callable, to their rows."""

    def read(i: int) -> Handles:
        rows = J.cuts[i]
        dense = write_out([(slice(0, rows.stop - rows.start), J.read(i))], params, rows.stop - rows.start)
        with error_context(J.side.name, J.side.order[rows]), translate_errors(params):
            return {**transformed(P, dense)}

    return Gradients(J.side, J.cuts, read)
