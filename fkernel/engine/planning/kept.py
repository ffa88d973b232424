"""Planning for a study: how U's gradients are computed once and kept, and how E is contracted with them.

compute U       for microbatch in U:  gradients(microbatch), summed and held, or written while the next are computed
contract        for tile in E:  J = gradients(tile);  for block in U:  K[tile, block] = contract(J, read(block))

bytes     compute:  m · (activations + handles, twice where they are written), and all handles where they are held
          contract: h handles of E + s of U, all of them where they are held, + the larger of a pass over E and tiles
seconds   compute:  gradients of U, and their writing
          contract: gradients of E, reading U once a tile, multiplying out
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Literal

from fkernel.engine.batching import SortedBatch
from fkernel.engine.planning.curve import Curve
from fkernel.engine.planning.estimates import weighed
from fkernel.engine.planning.machine import Rates
from fkernel.engine.planning.strategy import HANDLES, HOLES, LIBRARIES, STARTING, Option, Strategy, cost, parts
from fkernel.engine.planning.work import Work
from fkernel.engine.planning.workloads import Ready, Workload, counted
from fkernel.errors import BatchError
from fkernel.func.inputs import computed_like, take, translate_errors, trim
from fkernel.func.trust import plan_of
from fkernel.shapes import Tree
from fkernel.tree import size

HELD = 4 << 30
"""Bytes of gradients that are held at a time without a memory budget; half of it is U's."""

Where = Literal["memory", "disk"]


def load_of(params: Tree, side: SortedBatch) -> Workload:
    """Count the work of a batch's gradients on its longest sequence, or on three lengths where lengths differ.

    Args:
        params: θ.
        side: the sorted batch with its f; it is both E and U of the result, whose `of` rescales to other lengths.
    """
    assert side.f is not None
    tokens = {"E": [*side.tokens], "U": [*side.tokens]}
    with translate_errors(params):
        one = trim(take(side.batch, slice(0, 1)))
        return counted(side.f, params, one, tokens, plan_of(side.f, params, side.batch))


def read_load(params: Tree, tokens: Sequence[int], ready: Ready) -> Workload:
    """Return the workload of a kernel of a batch with itself whose gradients are already kept."""
    nothing = Curve(((1, Work(0.0, 0.0, 0.0, 0, 0, 0)),))
    itemsize = computed_like(params).element_size()
    return Workload({}, size(params), itemsize, 0.0, nothing).of(tokens, tokens, {"E": ready, "U": ready})


def making(load: Workload, speed: Rates, microbatch: int, where: Where, promised: bool = True) -> Option:
    """Predict the cost of computing a batch's gradients once.

    Args:
        load: with the batch as E.
        speed: how fast the machine is.
        microbatch: sequences of the greatest length in one pass.
        where: where the gradients are kept.
        promised: whether a memory budget was given: gradients are then copied together.
    """
    T, counts = load.longest, load.tokens["E"]
    m, whole = min(microbatch, len(counts)), sum(map(load.kept, counts))
    # Gradients being written are in memory beside the pass that computes the next.
    memory = m * int(HOLES * load.peak(T) + ((where == "disk") + promised) * HANDLES * load.kept(T))
    memory += min(LIBRARIES, memory // 2) + (0 if where == "disk" else whole)
    seconds = STARTING + load.producing("E", m * T, speed) + sum(counts) * load.forming / speed.forming
    disk = whole if where == "disk" else 0
    return Option(Strategy("sequences", "E", m * T, None, m * T), memory, disk, seconds + disk / speed.write)


def choose_making(load: Workload, memory: int, speed: Rates, microbatch: int, where: Where) -> Option:
    """Find the largest microbatch in which a batch's gradients are computed within a memory budget.

    Raises:
        BatchError: one sequence at a time does not fit; the message says how much would suffice.
    """
    kept = "" if where == "disk" else ", and all gradients (storage: {persist: true} keeps them on disk)"
    tried = [making(load, speed, m, where) for m in range(microbatch, 0, -1)]
    return _first(tried, memory, f"the activations and the gradient of one sequence of {load.longest} tokens{kept}")


def choose_meeting(load: Workload, memory: int, speed: Rates, microbatch: int, reserved: int = 0) -> Option:
    """Find the fastest way to contract E with gradients that are kept, within a memory budget less `reserved`.

    Args:
        load: with the batches that are `ready`.
        memory: the budget, bytes.
        speed: how fast the machine is.
        microbatch: sequences of E's greatest length in one pass, at most.
        reserved: bytes of vectors that are held meanwhile, part of the budget.

    Raises:
        BatchError: none fits; the message says how much would suffice.
    """
    predicted = weighed(load, speed, max(0, memory - reserved), microbatch, False)
    tried = [predicted.chosen or min(predicted.options, key=lambda option: option.memory or inf)]
    beside = f", and {reserved} bytes of vectors that are asked about" if reserved else ""
    what = f"one sequence's activations and gradient, a microbatch of U's{beside}"
    return _first(tried, memory, what, reserved)


def choose_tile(load: Workload, memory: int, speed: Rates) -> Option:
    """Find the largest tile for a kernel of a batch with itself, whose gradients are kept, within a memory budget.

    Raises:
        BatchError: none fits; the message says how much would suffice.
    """
    sizes = parts(sum(load.tokens["E"]), load.longest)
    tried = [cost(load, speed, Strategy("sequences", "E", tile, tile, None)) for tile in sizes]
    return _first(tried, memory, "two microbatches of gradients, and the kernel")


def _first(tried: list[Option], memory: int, what: str, reserved: int = 0) -> Option:
    for option in tried:
        if option.needs + reserved <= memory:
            return option
    raise BatchError(
        f"memory={memory} bytes is too small: it cannot hold {what}. Give at least {tried[-1].needs + reserved} bytes."
    )


def ungranted(E: Sequence[int], U: Ready, microbatch: int) -> Strategy:
    """Return the default without a memory budget: `HELD` bytes of gradients at a time, without counting work.

    Args:
        E: tokens of the rows.
        U: the kept gradients.
        microbatch: sequences of E's greatest length in one pass.
    """
    room = max(1, int(HELD / U.token_bytes / (1 if U.where == "memory" else 2)))
    return Strategy("sequences", "E", room, None if U.where == "memory" else room, microbatch * max(E))
