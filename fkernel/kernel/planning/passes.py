"""How many sequences may be under way in passes that hold vectors of the parameters' size and no gradient a sequence.

    vjp          total + one microbatch's Jᵀw + m · activations
    jvp          direction + m · activations, values and tangents
    curvature    the same, with second tangents

Activations are counted on one sequence of the greatest length (`fkernel.func.work`).
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any

import torch

from fkernel import tree
from fkernel.errors import BatchError
from fkernel.func.batch import by_length, take, trim
from fkernel.func.boundary import explained
from fkernel.func.gradient import first_derivative, pull_back, second_derivative
from fkernel.func.objective import Function, bare
from fkernel.func.work import work_of
from fkernel.kernel.budget import parse_bytes
from fkernel.kernel.planning.strategy import HOLES, USABLE
from fkernel.shapes import Tree

Pass = Callable[[Function, Tree, Any], Any]


def reverse(f: Function, params: Tree, batch: Any) -> Any:
    """One vjp."""
    value, pull = pull_back(bare(f), params, batch, 1)
    return pull(torch.ones_like(value)), value


def forward(f: Function, params: Tree, batch: Any) -> Any:
    """One jvp, along the parameters themselves: the cost does not depend on the direction."""
    return first_derivative(lambda p: bare(f)(p, batch), params, params)


def twice_forward(f: Function, params: Tree, batch: Any) -> Any:
    """One curvature."""
    return second_derivative(lambda p: bare(f)(p, batch), params, params)


def bytes_of(params: Tree) -> int:
    """Bytes of one vector of the parameters' size."""
    return sum(leaf.numel() * leaf.element_size() for leaf in params.values())


def microbatch_within(
    memory: int | str | None,
    microbatch: int,
    f: Function,
    params: Tree,
    batches: tuple[Any, ...],
    passes: tuple[Pass, ...],
    vectors: int,
    least: int = 0,
) -> int:
    """Find the largest microbatch whose passes stay within a grant.

    Args:
        memory: the grant; None leaves the microbatch as it is.
        microbatch: the largest that is wanted.
        f: (params, batch) -> [n].
        params: θ.
        batches: those that the passes run over.
        passes: of `reverse`, `forward`, `twice_forward`.
        vectors: vectors of the parameters' size that are held beside a pass.
        least: vectors that are held at some other moment, without a pass.

    Raises:
        BatchError: one sequence at a time does not fit; the message says what would.
    """
    if memory is None:
        return microbatch
    P, budget = bytes_of(params), parse_bytes(memory)
    longest = [trim(take(batch, by_length(batch)[:1])) for batch in batches]
    fitting, needed = microbatch, ceil(least * P / USABLE)
    with explained(params):
        for one in passes:
            # A reverse pass makes a vector of its own, which more sequences do not make larger.
            held = (vectors + (one is reverse)) * P
            peaks = [work_of(lambda p, x, one=one: one(f, p, x), params, x).peak for x in longest]
            each = max(1, ceil(HOLES * (max(peaks) - (one is reverse) * P)))
            fitting = min(fitting, int(budget * USABLE - held) // each)
            needed = max(needed, ceil((held + each) / USABLE))
    if fitting < 1 or budget < needed:
        raise BatchError(
            f"memory={memory!r} cannot hold {max(vectors + 1, least)} vectors of {tree.size(params)} parameters "
            f"({P} bytes each) and one sequence's activations; give at least {needed} bytes, or shorten the sequences."
        )
    return fitting
