"""The strategy of a kernel over several ranks within a budget of each of them.

Of a round each rank computes m sequences; of the held batch it keeps shards of h rows; P parameters, W ranks:

    bytes    h ⌈P/W⌉ + m · (a pass) + 2 m · (the largest parameter, or a bucket) + tiles + K
    time     the held batch once, the streamed batch once for each tile of the held one

Held rows are written out: factors take less where sequences are short, but a rank has only its share of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import NamedTuple

from fkernel.distributed import BUCKET
from fkernel.engine.planning.passes import HOLES
from fkernel.engine.planning.strategy import USABLE, Side, Strategy, parts
from fkernel.engine.planning.workloads import Workload
from fkernel.errors import BatchError
from fkernel.func.handles import tile_bytes
from fkernel.shapes import Tree


class Ranked(NamedTuple):
    """A strategy over ranks, and its cost.

    Attributes:
        strategy: the strategy.
        memory: bytes of each rank, beside the model, the preconditioner and the batches.
        passed: tokens whose gradients all ranks compute together, recomputed ones included.
    """

    strategy: Strategy
    memory: int
    passed: int

    @property
    def needs(self) -> int:
        """The smallest sufficient memory budget, bytes."""
        return ceil(self.memory / USABLE)


def choose_over_ranks(
    load: Workload, params: Tree, budget: int, microbatch: int, ranks: int, reserved: int = 0, needed: int = 0
) -> Strategy:
    """Choose the strategy that recomputes least within a budget less `reserved` bytes.

    Raises:
        BatchError: none fits, or the budget is below `needed`; the message says how much would suffice.
    """
    tried = [*_forms(load, params, microbatch, ranks)]
    fitting = [option for option in tried if option.needs <= budget - reserved]
    if fitting and needed <= budget:
        return min(fitting, key=lambda option: (option.passed, option.memory)).strategy
    least = max(needed, min(option.needs for option in tried) + reserved)
    raise BatchError(
        f"memory={budget} bytes of each of {ranks} ranks is too small for {load.size} parameters and sequences of "
        f"{load.longest} tokens. Give at least {least} bytes, shorten the sequences, or take more ranks."
    )


def _forms(load: Workload, params: Tree, microbatch: int, ranks: int) -> Iterator[Ranked]:
    T, total = load.longest, {side: sum(counts) for side, counts in load.tokens.items()}
    pairs: tuple[tuple[Side, Side], ...] = (("E", "U"), ("U", "E"))
    for m in sorted({microbatch, max(1, microbatch // 2), max(1, microbatch // 4), 1}, reverse=True):
        for held, streamed in pairs:
            for tile in (None, *parts(total[held], m * T * ranks)[1:], T):
                strategy = Strategy("sequences", held, tile, None, m * T)
                tiles = 1 if tile is None else ceil(total[held] / tile)
                yield Ranked(strategy, _bytes(load, params, strategy, m, ranks), total[held] + tiles * total[streamed])


def _bytes(load: Workload, params: Tree, strategy: Strategy, m: int, ranks: int) -> int:
    counts, own = load.tokens[strategy.held], max(m, 1)
    least = min(len(counts), own * ranks)
    held = len(counts) if strategy.tile is None else max(least, min(len(counts), strategy.tile // load.longest))
    shard = sum(ceil((leaf.shape[0] if leaf.ndim else 1) / ranks) * leaf[:1].numel() for leaf in params.values())
    largest = max(leaf.numel() for leaf in params.values()) * load.itemsize
    streamed = "U" if strategy.held == "E" else "E"
    passing = own * (HOLES * load.peak(load.longest) + (2 * load.row if load.dense_U else 0))
    exchanging = 2 * max(own * largest, min(BUCKET, own * load.row))
    tiles = tile_bytes(held + own * ranks, load.itemsize)
    K = 16 * len(counts) * len(load.tokens[streamed])
    return int(held * shard * load.itemsize + max(passing, 0) + exchanging + tiles + K)
