"""The largest microbatch for passes that hold vectors of the parameters' size and no per-sequence gradients.

    vjp          total + one microbatch's Jᵀw + m · activations
    jvp          direction + m · activations, values and tangents
    curvature    the same, with second tangents

Activations are counted on one sequence of the greatest length (`fkernel.engine.planning.work`).
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any, NamedTuple

import torch

from fkernel.engine.planning.strategy import USABLE
from fkernel.engine.planning.work import count_cost
from fkernel.func.inputs import Function, bare, by_length, take, translate_errors, trim
from fkernel.func.taps import pull_back
from fkernel.func.trust import first_derivative, second_derivative
from fkernel.io import parse_bytes
from fkernel.shapes import Tree

HOLES = 1.8
"""Memory of a pass, without vectors of the parameters' size, relative to its peak of live tensors."""

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


class Fit(NamedTuple):
    """What a memory budget allows.

    Attributes:
        microbatch: the largest whose passes stay within it, at least one.
        needed: bytes for one sequence at a time, the smallest budget that works.
    """

    microbatch: int
    needed: int


def max_microbatch(
    memory: int | str | None,
    microbatch: int,
    f: Function,
    params: Tree,
    batches: tuple[Any, ...],
    passes: tuple[Pass, ...],
    vectors: int,
    least: int = 0,
) -> Fit:
    """Find the largest microbatch whose passes stay within a memory budget, and the bytes for one sequence at a time.

    Args:
        memory: the budget; None leaves the microbatch as it is.
        microbatch: upper limit.
        f: (params, batch) -> [n].
        params: θ.
        batches: those that the passes run over.
        passes: of `reverse`, `forward`, `twice_forward`.
        vectors: vectors of the parameters' size that are held beside a pass.
        least: vectors that are held at another time, without a pass.
    """
    if memory is None:
        return Fit(microbatch, 0)
    P, budget = bytes_of(params), parse_bytes(memory)
    longest = [trim(take(batch, by_length(batch)[:1])) for batch in batches]
    fitting, needed = microbatch, ceil(least * P / USABLE)
    with translate_errors(params):
        for one in passes:
            # A reverse pass makes one gradient vector, whatever the number of sequences.
            held = (vectors + (one is reverse)) * P
            peaks = [count_cost(lambda p, x, one=one: one(f, p, x), params, x).peak for x in longest]
            each = max(1, ceil(HOLES * (max(peaks) - (one is reverse) * P)))
            fitting = min(fitting, int(budget * USABLE - held) // each)
            needed = max(needed, ceil((held + each) / USABLE))
    return Fit(max(1, fitting), needed)
