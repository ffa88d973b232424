"""What a contraction is about, made and checked once: two sides, the path of a step, and what is asked of both.

`blocks` runs it by whichever way was chosen; everything in the package that contracts gradients goes through it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fkernel.engine.batching import SortedBatch, cuts_of, error_context, transformed
from fkernel.engine.from_store import kernel_from_store
from fkernel.engine.gradients import Gradients, computed
from fkernel.engine.layerwise import Walking, layered, sources_of
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
    """Two sides and what is asked of their gradients.

    Attributes:
        params: θ.
        E: the rows, in the engine's order, with their f.
        U: the columns; E itself where the two are one, None where only rows are asked about.
        spec: what is asked; x is E, y is U.
        path: where E's gradients are taken; of `fkernel.engine.path.NODES`.
        step: Δθ; None where nothing moves.
        kept: U's gradients, where they are held or on disk already.
        P: a preconditioner that is no diagonal, which U's rows go through; None for one that stands in `spec`.
        store: a directory for the gradients of both sides.
        promised: whether memory was promised.
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


def blocks(problem: Problem, strategy: Strategy) -> Iterator[KernelBlock]:
    """Run a problem by one of the ways of `fkernel.engine.planning.strategy`; every one gives the same numbers.

    Yields:
        A `KernelBlock` a tile of E's rows.
    """
    if strategy.name == "layers":
        if problem.P is not None:
            raise BatchError(
                'The strategy "layers" has no whole gradient, and a P that is no diagonal needs whole gradients.'
            )
        sources = sources_of(problem.path, problem.params, problem.step)
        how = Walking(strategy.tokens or 0, strategy.every)
        yield from layered(problem.E, problem.U, sources, problem.params, problem.spec, how, **strategy.loops)
        return
    if is_half(problem.params):
        check_params(problem.params)  # says that only layers take it
    with ExitStack() as opened:
        E, U = _sources(problem, strategy, opened)
        yield from contraction(E, U, problem.spec, held=strategy.held, tile=strategy.tile, block=strategy.block)


def _sources(problem: Problem, strategy: Strategy, opened: ExitStack) -> tuple[Gradients, Gradients | None]:
    """Where both sides' gradients come from: computed as they are asked for, kept, or by way of a store."""
    nodes = nodes_of(problem.path, problem.params, problem.step)

    def source(side: SortedBatch, at: Any) -> Gradients:
        cuts = cuts_of(side, strategy.tokens)
        if strategy.name == "store":
            return opened.enter_context(kernel_from_store(_given(problem.store), problem.params, side, cuts))
        return computed(side, at, cuts, problem.promised)

    E = source(problem.E, nodes)
    if problem.U is None or problem.U is problem.E:
        return E, None if problem.U is None else E
    U = problem.kept or source(problem.U, ((1.0, problem.params),))
    return E, U if problem.P is None else _under(problem.P, U, problem.params)


def _under(P: Preconditioner, J: Gradients, params: Tree) -> Gradients:
    """Write gradients out and apply P to their rows, where P may be anything that a caller wrote."""

    def read(i: int) -> Handles:
        rows = J.cuts[i]
        dense = write_out([(slice(0, rows.stop - rows.start), J.read(i))], params, rows.stop - rows.start)
        with error_context(J.side.name, J.side.order[rows]), translate_errors(params):
            return {**transformed(P, dense)}

    return Gradients(J.side, J.cuts, read)


def _given(store: Path | str | None) -> Path | str:
    if store is None:
        raise BatchError('The strategy "store" keeps gradients on disk; say where: store="directory".')
    return store
