"""What every benchmark shares: the models, and `race`, which times the sides of a comparison in turns."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from benchmarks.models import THREADS, Subject, build
from benchmarks.ratios import Ratio, interleaved
from fkernel import reuse_memory

os.environ["HF_HUB_OFFLINE"] = "1"

Sides = dict[str, Callable[[], Any]]


@dataclass
class Groups:
    """The comparison under way: its sides (which may hold gigabytes) live until the next group begins."""

    rounds: int
    name: str = ""
    sides: Sides = field(default_factory=dict)
    ratios: dict[str, Ratio] = field(default_factory=dict)

    def enter(self, name: str, make: Callable[[], Sides]) -> None:
        """Build and compare the sides of a group, unless it is the one under way."""
        if name == self.name:
            return
        self.name, self.sides, self.ratios = "", {}, {}
        gc.collect()
        self.sides = make()
        self.ratios = interleaved(self.sides, self.rounds)
        self.name = name


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="tiny models and few rounds: does every benchmark run?")


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--quick"))


@pytest.fixture(scope="session", autouse=True)
def _threads(quick: bool) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1 if quick else THREADS)
    with (
        reuse_memory()
    ):  # all sides alike take memory that is warm: fresh memory costs what the machine's host is up to
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def subject(quick: bool) -> Subject:
    return build("tiny" if quick else "base")


@pytest.fixture(scope="session")
def groups(quick: bool) -> Groups:
    return Groups(rounds=3 if quick else 5)


@pytest.fixture
def race(benchmark: Any, groups: Groups) -> Callable[..., None]:
    """Time one side of a group: pytest-benchmark's statistics of it, its ratio to the group's first side beside them.

    The group's sides are compared in turns when its first test runs; every later test only adds its own statistics.
    """

    def run(side: str, group: str, make: Callable[[], Sides], target: float | None = None, **sizes: Any) -> None:
        groups.enter(group, make)
        if side not in groups.sides:
            pytest.skip(f"{side!r} cannot run on this machine")
        benchmark.group = group
        limit = next(iter(groups.sides))
        benchmark.extra_info.update(
            side=side, limit=limit, target=target, sizes=sizes, rounds=groups.rounds, **groups.ratios[side]._asdict()
        )
        benchmark.pedantic(groups.sides[side], rounds=2, iterations=1)

    return run
