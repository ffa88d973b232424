"""Gradients of one step of a run: of E along the step's path, and of U where it began.

Whole, a microbatch at a time; layer by layer, where sequences are long; or over several ranks, in each one's shards,
layer by layer too where θ is in shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from fkernel.distributed import Group, ShardedTree
from fkernel.engine.batching import SortedBatch, cuts_of
from fkernel.engine.gradients import Gradients, computed
from fkernel.engine.layerwise import Walking, sources_of
from fkernel.engine.layerwise_over_ranks import gradients_over_ranks
from fkernel.engine.over_ranks import ranked
from fkernel.engine.path import nodes_of
from fkernel.engine.planning import LONG, usual_microbatch
from fkernel.engine.planning.passes import max_microbatch, reverse
from fkernel.func.handles import Handles
from fkernel.func.inputs import take, token_grant, trim
from fkernel.func.layers import Cut, Walk, cut_of
from fkernel.shapes import Tree

VECTORS = 9
"""Vectors of the parameters' size that a step needs, beside E's adjoints, the path's nodes and the step itself."""


class Passes(NamedTuple):
    """How gradients are computed.

    Attributes:
        path: where E's are; of `fkernel.engine.path.NODES`.
        microbatch: sequences of the greatest length in one pass; None for the default.
        memory: budget in bytes; None for none.
        kept: bytes of U's gradients that may be kept from the first pass to the second.
        group: the ranks that account together; None for this process alone.
    """

    path: str
    microbatch: int | None
    memory: int | None
    kept: int
    group: Group | None = None

    @property
    def in_shards(self) -> Walking:
        """How θ in shards is walked: gathered once for all sequences; with a budget, for a few of them at a time."""
        return Walking(together=None if self.memory is None else LONG)


def gradients_of(
    side: SortedBatch, cuts: list[slice], params: Tree, delta: Tree | None, passes: Passes
) -> Iterator[tuple[slice, Handles]]:
    """Iterate over (rows in sorted order, gradients of some parameters), which add up to ḡ = Σ_j q_j ∇f(θ_j).

    Args:
        side: the sorted batch, with its f.
        cuts: its microbatches, of one process.
        params: θ.
        delta: Δθ, for the path; None where it is not needed.
        passes: how they are computed; over ranks, the gradients are of this rank's shards.
    """
    path = passes.path
    if isinstance(params, ShardedTree):
        sources = sources_of(path, params, delta)
        yield from gradients_over_ranks(side, sources, params, passes.in_shards, params.group)
        return
    cut = long_cut(side, params)
    if passes.group is not None:
        rows = cuts[0]
        tokens = (rows.stop - rows.start) * side.tokens[rows.start]
        promised = passes.memory is not None
        yield from whole(ranked(side, nodes_of(path, params, delta), tokens, passes.group, params, promised))
        return
    if cut is None:
        yield from whole(computed(side, nodes_of(path, params, delta), cuts, passes.memory is not None))
        return
    for rows in cuts:
        for q, source in sources_of(path, params, delta):
            for some, handles in Walk(cut, source, trim(take(side.batch, rows)), weight=q).back():
                yield slice(rows.start + some.start, rows.start + some.stop), handles


def whole(J: Gradients) -> Iterator[tuple[slice, Handles]]:
    """Iterate over microbatches, and over groups of parameters that can be read separately: (rows, gradients)."""
    if J.shares is None:
        return ((rows, J.read(i)) for i, rows in enumerate(J.cuts))
    return ((rows, J.read(i, names)) for i, rows in enumerate(J.cuts) for names in J.shares)


def microbatches(side: SortedBatch, params: Tree, passes: Passes, adjoints: int) -> list[slice]:
    """Cut a batch into microbatches whose passes fit the budget beside the adjoints."""
    assert side.f is not None
    m = usual_microbatch(passes.microbatch, side.batch)
    if passes.memory is not None and side.tokens[0] <= LONG and not isinstance(params, ShardedTree):
        held = VECTORS + 1 + adjoints
        m = max_microbatch(passes.memory, m, side.f, params, (side.batch,), (reverse,), vectors=held).microbatch
    return cuts_of(side, token_grant(side.batch, m))


def long_cut(side: SortedBatch, params: Tree) -> Cut | None:
    """Cut f at its layers where sequences are so long that they are computed layer by layer."""
    assert side.f is not None
    cut = cut_of(side.f, params, side.batch) if side.tokens[0] > LONG else "short"
    return None if isinstance(cut, str) else cut
