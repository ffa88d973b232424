"""The form of a layered contraction whose parameters are in shards, within a budget of each rank.

With W ranks, n sequences of T tokens, of which each rank has n/W, h of them held, p the parameters of the largest piece
(a layer, or the head's table), L layers of which every k-th input is kept:

    own          (h + s)/W · (L/k + k + 3) T d + (h/W + 1) p + the largest layer's pass      `planning.walking`
    gathered     2 p             a piece, and the bucket that it comes in
    exchanged    2 h p/W         rows of own sequences on their way, and all sequences' in the own shard

Where nothing else fits, the held batch is cut into tiles, and the other is recomputed for each.
"""

from __future__ import annotations

from itertools import product
from math import ceil

from fkernel.engine.planning.strategy import EVERY, USABLE, Side, Strategy, parts
from fkernel.engine.planning.walking import Walk, tiles_of
from fkernel.errors import BatchError


def choose_in_shards(
    walk: Walk, tokens: dict[str, list[int]], itemsize: int, ranks: int, budget: int, reserved: int = 0
) -> Strategy:
    """Choose the form that recomputes least within a budget less `reserved` bytes.

    Args:
        walk: the cost of a sequence.
        tokens: {"E": tokens of each sequence, "U": …}, longest first.
        itemsize: bytes of a float.
        ranks: W.
        budget: bytes of each rank, beside θ, the optimizer's state and the batches.
        reserved: bytes of vectors that are held beside the contraction.

    Raises:
        BatchError: none fits; the message says how much would suffice.
    """
    own = {side: counts[::ranks] for side, counts in tokens.items()}
    pairs: tuple[tuple[Side, Side], ...] = (("E", "U"), ("U", "E"))
    tried = list[tuple[int, int, Strategy]]()
    for held, streamed in pairs:
        T = own[held][0]
        for every, tile in product(EVERY, (None, *parts(sum(own[held]), T)[1:])):
            strategy = Strategy("layers", held, tile, None, 0, every)
            passes = sum(own[held]) + len(tiles_of(own[held], tile)) * sum(own[streamed])
            bytes_ = bytes_in_shards(walk, tokens, itemsize, ranks, strategy)
            tried.append((passes * (3 if every == 1 else 4), bytes_, strategy))
    fitting = [each for each in tried if ceil(each[1] / USABLE) + reserved <= budget]
    if fitting:
        return min(fitting, key=lambda each: each[:2])[2]
    least = ceil(min(each[1] for each in tried) / USABLE) + reserved
    raise BatchError(
        f"memory={budget} bytes of each of {ranks} ranks is too small beside parameters in shards. Give at least "
        f"{least} bytes, shorten the sequences, or take more ranks."
    )


def bytes_in_shards(walk: Walk, tokens: dict[str, list[int]], itemsize: int, ranks: int, strategy: Strategy) -> int:
    """Predict the bytes of a rank, by the formulas above; K included."""
    own = {side: counts[::ranks] for side, counts in tokens.items()}
    piece = max(walk.largest, walk.head) * itemsize
    rows = max(tile.stop - tile.start for tile in tiles_of(own[strategy.held], strategy.tile))
    passes = walk.memory(own, itemsize, strategy.every, 0, strategy.held, strategy.tile, strategy.block)
    return passes + 2 * piece + 2 * rows * piece + 16 * len(tokens["E"]) * len(tokens["U"])
