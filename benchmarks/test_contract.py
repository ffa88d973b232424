"""Contraction against the ideal GEMM: one `x @ y.T` over gradients that already lie side by side."""

from __future__ import annotations

import os
import shutil
from typing import NamedTuple

import pytest

from benchmarks.conftest import Sides
from benchmarks.limits import concatenated
from benchmarks.models import rows
from fkernel import func

SIDES = ("x @ y.T", "contract, eager", "contract, jitted")


class Aspect(NamedTuple):
    """K [n, m] over P columns, which 26 parameters of unequal sizes share."""

    n: int
    m: int
    P: int


ASPECTS = {
    "few rows, many columns": Aspect(16, 16, 13_000_000),
    "square": Aspect(64, 64, 4_000_000),
    "many rows, few columns": Aspect(512, 128, 800_000),
}


def sides(aspect: Aspect) -> Sides:
    """K = x yᵀ, with the gradients as `per_sequence_grad` leaves them, and concatenated for the limit."""
    table = aspect.P // 4
    widths = {"table": table} | {f"layer {i}": (aspect.P - table) // 25 for i in range(25)}
    x, y = rows(widths, aspect.n, 1), rows(widths, aspect.m, 2)
    X, Y = concatenated(x), concatenated(y)
    found: Sides = {"x @ y.T": lambda: X @ Y.T, "contract, eager": lambda: func.contract(x, y, jit=False)}
    if shutil.which(os.environ.get("CXX", "c++")):
        found["contract, jitted"] = lambda: func.contract(x, y, jit=True)
    return found


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("aspect", ASPECTS)
def test_contract(race, quick, aspect, side):
    n, m, P = ASPECTS[aspect]
    size = Aspect(n // 4, m // 4, P // 200) if quick else Aspect(n, m, P)
    race(side, f"contract, {aspect}", lambda: sides(size), **size._asdict())
