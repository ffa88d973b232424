"""`fkernel.estimate` against what happens: memory, time and choice over a grid of cases.

A case is a model, two batches and a grant between what the smallest strategy needs and what the largest does. Every
strategy that is feasible is run in a process of its own, for the peak memory that its first call adds; for their times
they take turns in one process, and each round is its own comparison (`benchmarks.ratios`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import Any

from benchmarks import memory
from benchmarks.models import build
from benchmarks.ratios import interleaved
from fkernel import Strategy, estimate, kernel, precond

CLOSE = 1.05
"""A strategy within five percent of the fastest is a right choice."""
ROUNDS = 5
MEMORY, TIME, CHOICE = 0.15, 0.30, 0.90

Case = dict[str, Any]


def cases(quick: bool = False) -> Iterator[Case]:
    """Walk the grid: models × sizes × how much is granted, from hardly enough to plenty."""
    if quick:
        yield {"shape": "tiny", "n_E": 4, "n_U": 8, "T": 32, "ample": 0.5}
        return
    for shape, sizes in (
        ("small", ((16, 32, 128), (8, 64, 128), (32, 32, 64), (16, 48, 256), (64, 128, 64))),
        ("base", ((8, 16, 128), (4, 12, 256), (16, 16, 64), (6, 6, 128), (2, 32, 64))),
    ):
        for n_E, n_U, T in sizes:
            for ample in (0.1, 0.5, 1.2):
                yield {"shape": shape, "n_E": n_E, "n_U": n_U, "T": T, "ample": ample}


def planned(shape: str, n_E: int, n_U: int, T: int, ample: float) -> dict[str, Any]:
    """Estimate one case: its grant, and what each strategy is predicted to take."""
    f, params, E, U, P = _problem(shape, n_E, n_U, T)
    with tempfile.TemporaryDirectory() as disk:
        needs = [option.needs for option in estimate(f, params, E, U, P, store=disk).options]
        grant = int(min(needs) + ample * (max(needs) - min(needs)))
        found = estimate(f, params, E, U, P, memory=grant, store=disk)
    assert found.chosen is not None
    return {
        "grant_MB": grant / memory.MB,
        "chosen": found.chosen.name,
        "options": [
            {
                "strategy": option.strategy,
                "predicted_MB": option.memory / memory.MB,
                "predicted_s": option.seconds,
                "feasible": not option.infeasible_reason,
            }
            for option in found.options
        ],
    }


def run(shape: str, n_E: int, n_U: int, T: int, strategy: list[Any]) -> dict[str, Any]:
    """Run one strategy in a process of its own: what its first call adds to it."""
    problem = _problem(shape, n_E, n_U, T)
    memory._forget_peak()
    before = memory._status("VmRSS") or memory._high_water()
    with tempfile.TemporaryDirectory() as disk:
        kernel(*problem, strategy=Strategy(*strategy), store=disk)
    return {"measured_MB": (memory._status("VmHWM") or memory._high_water()) - before}


def race(shape: str, n_E: int, n_U: int, T: int, strategies: list[list[Any]], rounds: int) -> dict[str, Any]:
    """Let strategies take turns in one process: the seconds of each, as multiples of the first one's in every round."""
    problem = _problem(shape, n_E, n_U, T)

    def once(strategy: Strategy) -> None:
        with tempfile.TemporaryDirectory() as disk:
            kernel(*problem, strategy=strategy, store=disk)

    sides = {str(i): partial(once, Strategy(*strategy)) for i, strategy in enumerate(strategies)}
    found = interleaved(sides, rounds)
    return {"measured_s": [found["0"].seconds * found[name].ratio for name in sides]}


def _problem(shape: str, n_E: int, n_U: int, T: int) -> tuple[Any, ...]:
    subject = build(shape)
    P = precond.diagonal({name: 1.0 / (leaf.abs() + 0.1) for name, leaf in subject.params.items()})
    return subject.f, subject.params, subject.batch(n_E, T, 1), subject.batch(n_U, T, 2), P


def verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Sum a grid up: how far predictions of what was chosen were off, and how often the choice was right.

    Example:
        >>> option = {"strategy": ["memory"], "feasible": True, "predicted_MB": 110, "predicted_s": 1.2}
        >>> row = {"chosen": "memory", "options": [option | {"measured_MB": 100, "measured_s": 1.0}]}
        >>> found = verdict([row])
        >>> found["memory_within"], found["time_within"], found["right_choices"]
        (1.0, 1.0, 1.0)
    """
    off: dict[str, list[float]] = {"memory": [], "time": []}
    losses = []
    for row in rows:
        tried = [option for option in row["options"] if option["feasible"]]
        (own,) = [option for option in tried if option["strategy"][0] == row["chosen"]]
        off["memory"].append(own["predicted_MB"] / own["measured_MB"] - 1)
        off["time"].append(own["predicted_s"] / own["measured_s"] - 1)
        losses.append(own["measured_s"] / min(option["measured_s"] for option in tried))
    return {
        "cases": len(rows),
        "memory_within": sum(abs(x) <= MEMORY for x in off["memory"]) / len(rows),
        "memory_off": [min(off["memory"]), median(off["memory"]), max(off["memory"])],
        "time_within": sum(abs(x) <= TIME for x in off["time"]) / len(rows),
        "time_off": [min(off["time"]), median(off["time"]), max(off["time"])],
        "right_choices": sum(loss <= CLOSE for loss in losses) / len(rows),
        "lost_by_choice": [median(losses) - 1, max(losses) - 1],
        "targets": {"memory": MEMORY, "time": TIME, "right_choices": CHOICE},
    }
