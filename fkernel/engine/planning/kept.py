"""How E meets gradients of U that were made before, and how U's are made: what a study asks of the planner.

made once       for microbatch in U:  gradients(microbatch), added up and held, or written while the next are made
met by E        for tile in E:  J = gradients(tile);  for block in U:  K[tile, block] = contract(J, read(block))

bytes     made: m · (activations + handles, twice where they are written), and all handles where they are held
          met:  h handles of E + s of U, all of them where they are held, + the larger of a pass over E and tiles
seconds   made: gradients of U, and their writing;  met: gradients of E, U's reading once a tile, multiplying out
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
from fkernel.func.inputs import take, translate_errors, trim, widened
from fkernel.func.trust import plan_of
from fkernel.shapes import Tree
from fkernel.tree import size

HELD = 4 << 30
"""Bytes of gradients that are held at a time where no memory was granted; half of it is U's."""

Where = Literal["memory", "disk"]


def load_of(params: Tree, side: SortedBatch) -> Workload:
    """Count a side's gradients on its longest sequence, or on three lengths where they differ.

    Args:
        params: θ.
        side: with its f; both sides of what is returned, whose `of` gives the same work for other lengths.
    """
    assert side.f is not None
    tokens = {"E": [*side.tokens], "U": [*side.tokens]}
    with translate_errors(params):
        one = trim(take(side.batch, slice(0, 1)))
        return counted(side.f, params, one, tokens, plan_of(side.f, params, side.batch))


def read_load(params: Tree, tokens: Sequence[int], ready: Ready) -> Workload:
    """What a side that meets itself has to do, where nothing of it is computed: its gradients are ready."""
    nothing = Curve(((1, Work(0.0, 0.0, 0.0, 0, 0, 0)),))
    itemsize = widened(next(iter(params.values()))[..., :0]).element_size()
    return Workload({}, size(params), itemsize, 0.0, nothing).of(tokens, tokens, {"E": ready, "U": ready})


def making(load: Workload, speed: Rates, microbatch: int, where: Where, promised: bool = True) -> Option:
    """Predict what making a side's gradients once takes.

    Args:
        load: with the side as E.
        speed: how fast the machine is.
        microbatch: sequences of the greatest length under way at once.
        where: the gradients are kept.
        promised: whether memory was: they are moved together then, which is a copy.
    """
    T, counts = load.longest, load.tokens["E"]
    m, whole = min(microbatch, len(counts)), sum(map(load.kept, counts))
    # Those that are written lie beside the pass that makes the next ones.
    memory = m * int(HOLES * load.peak(T) + ((where == "disk") + promised) * HANDLES * load.kept(T))
    memory += min(LIBRARIES, memory // 2) + (0 if where == "disk" else whole)
    seconds = STARTING + load.producing("E", m * T, speed) + sum(counts) * load.forming / speed.forming
    disk = whole if where == "disk" else 0
    return Option(Strategy("sequences", "E", m * T, None, m * T), memory, disk, seconds + disk / speed.write)


def choose_making(load: Workload, memory: int, speed: Rates, microbatch: int, where: Where) -> Option:
    """Find the largest microbatch in which a side's gradients are made within a grant.

    Raises:
        BatchError: one sequence at a time does not fit; the message says what would be enough.
    """
    kept = "" if where == "disk" else ", and all gradients (storage: {persist: true} keeps them on disk)"
    tried = [making(load, speed, m, where) for m in range(microbatch, 0, -1)]
    return _first(tried, memory, f"the activations and the gradient of one sequence of {load.longest} tokens{kept}")


def choose_meeting(load: Workload, memory: int, speed: Rates, microbatch: int, reserved: int = 0) -> Option:
    """Find the fastest way in which E meets gradients that are there, within what a grant leaves.

    Args:
        load: with the sides that are `ready`.
        memory: the grant, bytes.
        speed: how fast the machine is.
        microbatch: sequences of E's greatest length under way at once, at most.
        reserved: bytes of vectors that are held meanwhile, and that the grant covers.

    Raises:
        BatchError: none fits; the message says what would be enough.
    """
    found = weighed(load, speed, max(0, memory - reserved), microbatch, False)
    tried = [found.chosen or min(found.options, key=lambda option: option.memory or inf)]
    beside = f", and {reserved} bytes of vectors that are asked about" if reserved else ""
    what = f"one sequence's activations and gradient, a microbatch of U's{beside}"
    return _first(tried, memory, what, reserved)


def choose_tile(load: Workload, memory: int, speed: Rates) -> Option:
    """Find the largest tile in which a side whose gradients are there meets itself within a grant.

    Raises:
        BatchError: none fits; the message says what would be enough.
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
    """What is done where no memory is granted: `HELD` bytes of gradients are held at a time, and nothing is counted.

    Args:
        E: tokens of the rows.
        U: gradients that are there.
        microbatch: sequences of E's greatest length under way at once.
    """
    room = max(1, int(HELD / U.token_bytes / (1 if U.where == "memory" else 2)))
    return Strategy("sequences", "E", room, None if U.where == "memory" else room, microbatch * max(E))
