"""Ratios that survive a noisy machine: sides take turns, A B C A B C …, and every round is its own comparison.

A machine that slows down slows all sides of a round. So the ratio is taken within each round, and the median of those
ratios is reported, not the ratio of two medians from different minutes.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple


class Ratio(NamedTuple):
    """One side of a comparison.

    Attributes:
        seconds: median over the rounds.
        ratio: median over the rounds of this side's time over the first side's; 1.0 for the first.
        least: the smallest of those ratios.
        most: the largest.
    """

    seconds: float
    ratio: float
    least: float
    most: float


def interleaved(
    sides: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Ratio]:
    """Time several callables in turns and compare each to the first, the limit.

    Args:
        sides: {name: callable}; the first is what the others are divided by.
        rounds: how many times each side is timed.
        warmup: rounds before those, not timed.
        clock: seconds, as `time.perf_counter`.

    Returns:
        {name: Ratio}, in the order given.

    Raises:
        ValueError: no side, or fewer than one round.

    Example:
        >>> ticks = iter([0, 1, 1, 3, 3, 5, 5, 9])  # sides take 1 and 2 seconds, then 2 and 4
        >>> interleaved({"limit": int, "ours": int}, rounds=2, warmup=0, clock=lambda: next(ticks))["ours"]
        Ratio(seconds=3.0, ratio=2.0, least=2.0, most=2.0)
    """
    if not sides or rounds < 1:
        raise ValueError(f"Nothing to compare: {len(sides)} sides, {rounds} rounds; give at least one of each.")
    for _ in range(warmup):
        for side in sides.values():
            side()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, side in sides.items():
                start = clock()
                side()
                seconds[name].append(clock() - start)
    finally:
        if collecting:
            gc.enable()
    return compare(seconds)


def compare(seconds: Mapping[str, Sequence[float]]) -> dict[str, Ratio]:
    """Turn the seconds of every round into medians and ratios to the first side.

    Example:
        >>> compare({"limit": [1.0, 2.0, 4.0], "ours": [2.0, 4.0, 4.0]})["ours"].ratio
        2.0
    """
    limit = next(iter(seconds.values()))
    result = {}
    for name, times in seconds.items():
        ratios = [own / other for own, other in zip(times, limit, strict=True)]
        result[name] = Ratio(float(median(times)), float(median(ratios)), min(ratios), max(ratios))
    return result
