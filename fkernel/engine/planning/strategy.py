"""The strategies to compute a kernel, and the cost of each.

One batch's gradients are held, the other's stream past them a block at a time, and every pair of a held and a streamed
gradient is contracted once:

    for tile in held:  J = gradients(tile)
        for block in streamed:  K[tile, block] = contract(J, gradients(block))

    sequences   gradients of whole sequences, in handles; with several tiles, what streams is recomputed for each
    layers      both batches run backward together, holding one layer's gradients (`planning.walking`); each batch is
                recomputed for every part of the other
    store       both batches' handles are written to disk, and read a few parameters at a time (`engine.from_store`)

Below, a batch has n sequences of t₁ ≥ t₂ ≥ … tokens, P parameters; the held one is cut into `tiles` of h sequences.

    bytes     h handles + one block's handles + the larger of activations and contraction tiles + K
              store: K + the larger of (activations + a microbatch's handles) and (one parameter's handles + tiles)
    seconds   gradients of both batches (once; the streamed one `tiles` times where it is recomputed)
              + multiplying out (held: once a block; streamed: once a tile) + 2 n_E n_U P
              store: plus writing and reading
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import ceil
from typing import Any, Literal, NamedTuple

from fkernel.engine.planning.machine import Rates
from fkernel.engine.planning.workloads import LONG, Workload
from fkernel.func.handles import tile_bytes
from fkernel.func.inputs import check_size, lengths

MICROBATCH = 8
TOKENS = LONG
"""A microbatch: eight sequences, or as many as have so many tokens; more are no faster on a CPU (benchmarks/)."""
BLOCK = 64
"""Largest number of streamed sequences of the greatest length in a block; larger blocks are hardly faster."""
HOLES = 1.4
"""Memory of a pass relative to its peak of live tensors. This and the next three were fitted to one run of the
planner's grid (benchmarks/planner.py), with 98 % of all strategies' predictions within 15 %."""
HANDLES = 1.2
"""The same for handles, which are many tensors, or are copied into one."""
LIBRARIES = 20_000_000
"""Bytes that libraries allocate at first use; for a tiny problem at most half of its own memory is added."""
STARTING = 0.2
"""Seconds of overhead of any kernel: arguments are checked, f's layers are located."""
EVERY = (1, 2, 4, 8)
"""One in so many layer inputs is kept."""
USABLE = 0.95
"""Share of a memory budget that plans may use."""

Name = Literal["sequences", "layers", "store"]
NAMES: tuple[Name, ...] = ("sequences", "layers", "store")
Side = Literal["E", "U"]


class Strategy(NamedTuple):
    """How a kernel is computed; all strategies give the same numbers.

    Attributes:
        name: "sequences", "layers" or "store".
        held: the batch whose gradients are held while the other's stream past.
        tile: tokens of the held batch in memory at a time (None: all).
        block: tokens of the streamed batch in memory at a time (None: all).
        tokens: tokens of one microbatch (None: all; 0 with "layers": one sequence at a time).
        every: with "layers", one in so many layer inputs is kept.
    """

    name: Name
    held: Side
    tile: int | None
    block: int | None
    tokens: int | None
    every: int = 1

    @property
    def loops(self) -> dict[str, Any]:
        """The loop arguments of `fkernel.engine.streaming`."""
        return {"held": self.held, "tile": self.tile, "block": self.block}


class Option(NamedTuple):
    """A strategy and its cost.

    Attributes:
        strategy: the fastest form within the budget, or the smallest where none fits.
        memory: bytes in addition to the model, the optimizer's state, the preconditioner and the batches.
        disk: bytes.
        seconds: predicted time.
        infeasible_reason: why it cannot be chosen; empty where it can.
    """

    strategy: Strategy
    memory: int
    disk: int
    seconds: float
    infeasible_reason: str = ""

    @property
    def name(self) -> Name:
        """The strategy's name."""
        return self.strategy.name

    @property
    def needs(self) -> int:
        """The smallest sufficient memory budget, bytes."""
        return ceil(self.memory / USABLE)


def usual_microbatch(microbatch: int | None, *batches: Any) -> int:
    """Return the microbatch, in sequences of the greatest length; None for the default (see `TOKENS`).

    Raises:
        BatchError: it is neither a positive integer nor None.
    """
    check_size(microbatch)
    if microbatch is not None:
        return microbatch
    counts = [lengths(batch) for batch in batches]
    longest = max((int(each.max()) for each in counts if each is not None), default=TOKENS)
    return max(MICROBATCH, TOKENS // longest)


def default(n_E: int, n_U: int, T: int, microbatch: int, dense_U: bool) -> Strategy:
    """Return the default without a memory budget: all handles of the smaller batch are held."""
    held: Side = "E" if n_E <= n_U else "U"
    # Held factors are multiplied out once a block, so a block has at least as many sequences as are held; dense rows
    # of U are too large for that.
    block = microbatch if dense_U and held == "E" else max(BLOCK, min(n_E, n_U))
    return Strategy("sequences", held, None, block * T, microbatch * T)


def options(
    load: Workload, rates: Rates, budget: int | None, microbatch: int, store: bool = False
) -> tuple[Option, ...]:
    """Find the fastest form of each strategy under a budget.

    Args:
        load: the work.
        rates: how fast the machine is.
        budget: bytes; None for no bound.
        microbatch: sequences of the greatest length in one pass, at most.
        store: whether a directory for gradients was given.

    Returns:
        One `Option` a strategy, in the order of the module's table.
    """
    forms = []
    for name in NAMES:
        if why := load.impossible(name):
            forms.append(Option(Strategy(name, "E", None, None, 0), 0, 0, 0.0, why))
            continue
        tried = [cost(load, rates, strategy) for strategy in _forms(load, microbatch, name)]
        fitting = [option for option in tried if budget is None or option.needs <= budget]
        if not fitting:
            least = min(tried, key=lambda option: option.memory)
            forms.append(least._replace(infeasible_reason=f"needs {least.needs} bytes"))
        elif name == "store" and not store:
            best = min(fitting, key=lambda option: option.seconds)
            forms.append(best._replace(infeasible_reason="no directory was given (store=)"))
        else:
            forms.append(min(fitting, key=lambda option: option.seconds))
    return tuple(forms)


def _forms(load: Workload, microbatch: int, name: Name) -> Iterator[Strategy]:
    """Iterate over the forms of a strategy: held batch, tile, block, microbatch, kept layer inputs."""
    T, total = load.longest, {side: sum(counts) for side, counts in load.tokens.items()}
    pairs: tuple[tuple[Side, Side], ...] = (("E", "U"), ("U", "E"))
    for m in sorted({microbatch, max(1, microbatch // 2), max(1, microbatch // 4), 1}):
        if name == "layers":
            assert not isinstance(load.walk, str)
            for tokens in (0, m * T) if load.walk.blocks else (0,):
                for held, streamed in pairs:
                    tiles, blocks = ((None, *parts(total[side], T)[1:]) for side in (held, streamed))
                    for every, tile, block in product(EVERY, tiles, blocks):
                        yield Strategy(name, held, tile, block, tokens, every)
            continue
        if name == "store":  # neither batch is held: only tile and block vary
            for tile in parts(total["E"], m * T):
                for block in parts(total["U"], m * T):
                    yield Strategy(name, "E", tile, block, m * T)
            continue
        # Where gradients of U are kept, E is the one that is held, a tile at a time.
        for held, streamed in pairs[:1] if load.ready else pairs:
            most = min(BLOCK * T, total[streamed]) if load.dense_U else total[streamed]
            for block in parts(most, m * T):
                # A tile has at least one microbatch; a single tile recomputes nothing.
                for tile in (None, *(parts(total[held], m * T)[1:] or [T] * (m == 1))):
                    yield Strategy(name, held, tile, block, m * T)


def parts(n: int, least: int) -> list[int]:
    """Return n and smaller sizes, multiples of `least`, by ratios of about 1.4."""
    sizes, size = [n], float(n)
    while size > least:
        size /= 1.4
        whole = max(1, int(size) // least) * least
        if whole < sizes[-1]:
            sizes.append(whole)
    return sizes


def cost(load: Workload, rates: Rates, strategy: Strategy) -> Option:
    """Predict the cost of a strategy, by the formulas above."""
    predictions = {"sequences": _streamed, "layers": _walked, "store": _spilled}
    memory, disk, seconds = predictions[strategy.name](load, rates, strategy)
    return Option(strategy, memory + min(LIBRARIES, memory // 2), disk, STARTING + seconds)


def _streamed(load: Workload, rates: Rates, strategy: Strategy) -> tuple[int, int, float]:
    _, held, tile, block, tokens, _ = strategy
    streamed = "U" if held == "E" else "E"
    T, row = load.longest, load.row
    n_h, n_s = len(load.tokens[held]), len(load.tokens[streamed])
    # The longest sequences come first, so the first tile, block and microbatch are the largest.
    m = min(max(1, (tokens or T) // T), max(n_h, n_s))
    least = {side: load.ready[side].rows if side in load.ready else 1 for side in load.tokens}
    h, s = (
        max(_rows(load.tokens[side], size, m * T), min(least[side], len(load.tokens[side])))
        for side, size in ((held, tile), (streamed, block))
    )
    tiles, blocks = ceil(n_h / h), ceil(n_s / s)

    # Preconditioned rows of U are dense, and concatenated.
    each_h = 3 * row if load.dense_U and held == "U" else HANDLES * load.kept_by(held, h)
    each_s = 3 * row if load.dense_U and streamed == "U" else HANDLES * load.kept_by(streamed, s)
    held_bytes, streamed_bytes = h * each_h, s * each_s
    there = {side for side, ready in load.ready.items() if ready.where == "memory"}
    if streamed in there:  # all of them stay in memory, the held ones among them where those are kept too
        held_bytes, streamed_bytes = 0 if held in there else held_bytes, n_s * load.kept_by(streamed, n_s)
    elif len(load.ready) == 2 and load.tokens["E"] == load.tokens["U"] and (h, s) == (n_h, n_s):
        streamed_bytes = 0  # U with itself, whole: it is read once
    # Kept handles are copied out of their pass, and freed memory fragments.
    passing = min(m, max(h, s)) * (HOLES * load.peak(T) + (2 * row if load.dense_U else 0))
    contracting = min(tile_bytes(h + s, load.itemsize), (h + s) * row)
    memory = n_h * n_s * 2 * load.itemsize + h * s * 12 + int(held_bytes + streamed_bytes + max(contracting, passing))

    seconds = load.producing(held, tokens, rates) + load.multiplying(held, rates) * blocks
    seconds += (load.producing(streamed, tokens, rates) + load.multiplying(streamed, rates)) * tiles
    seconds += 2.0 * n_h * n_s * load.size / rates.flops
    return memory, 0, seconds


def _walked(load: Workload, rates: Rates, strategy: Strategy) -> tuple[int, int, float]:
    walk, every, block = load.walk, strategy.every, strategy.tokens or 0
    assert not isinstance(walk, str)
    K = len(load.tokens["E"]) * len(load.tokens["U"]) * 16
    holding = strategy.held, strategy.tile, strategy.block
    seconds = walk.seconds(load.tokens, load.size, load.itemsize, rates, every, block, *holding)
    return K + walk.memory(load.tokens, load.itemsize, every, block, *holding), 0, seconds


def _spilled(load: Workload, rates: Rates, strategy: Strategy) -> tuple[int, int, float]:
    _, held, tile, block, tokens, _ = strategy
    n = {side: len(load.tokens[side]) for side in ("E", "U")}
    at_once = dict(zip("EU" if held == "E" else "UE", (tile, block), strict=True))
    m = min(max(1, (tokens or load.longest) // load.longest), max(n.values()))
    rows = {side: _rows(load.tokens[side], at_once[side], m * load.longest) for side in n}
    times = {"E": ceil(n["U"] / rows["U"]), "U": ceil(n["E"] / rows["E"])}

    kept = {side: load.kept_by(side, rows[side]) for side in n}
    passing = m * (HOLES * load.peak(load.longest) + HANDLES * load.kept(load.longest))
    contracting = load.widest * sum(rows[side] * kept[side] for side in n)
    contracting += tile_bytes(sum(rows.values()), load.itemsize)
    if load.dense_U:  # rows of U are read, preconditioned and concatenated
        contracting += rows["U"] * 3 * load.row
    memory = n["E"] * n["U"] * 16 + rows["E"] * rows["U"] * 12 + int(max(passing, contracting))

    disk = {side: n[side] * load.kept_by(side, n[side]) for side in n}
    # Writing runs beside the passes, but these need every core: no time is saved.
    seconds = sum(load.producing(side, tokens, rates) + disk[side] / rates.write for side in n)
    seconds += sum(times[side] * (load.multiplying(side, rates) + disk[side] / rates.read) for side in n)
    seconds += 2.0 * n["E"] * n["U"] * load.size / rates.flops
    return memory, sum(disk.values()), seconds


def _rows(counts: list[int], tokens: int | None, microbatch: int) -> int:
    """Return how many sequences, longest first, fit in so many tokens, in whole microbatches."""
    if tokens is None or tokens >= sum(counts):
        return len(counts)
    whole = max(microbatch, tokens // microbatch * microbatch)
    return min(len(counts), max(1, whole * len(counts) // sum(counts)))
