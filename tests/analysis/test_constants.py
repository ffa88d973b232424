"""What does not vary has no correlation and no slope, whatever rounding makes of its mean."""

from __future__ import annotations

import math

import pytest
import torch

import fkernel as fk
from fkernel.engine.correlation import mean_ranks, pearson, varies

DTYPES = [torch.float32, torch.float64]
VARIED = torch.tensor([0.2, -0.1, 0.3, 0.25, 0.1, -0.4, 0.7])


def constants(dtype, n):
    """Equal numbers, of which the mean is rounded; and the same with a roundoff more or less."""
    unit = torch.finfo(dtype).eps
    for value in (0.1, -1 / 3, 1e-7, 123.456):
        equal = torch.full((n,), value, dtype=dtype)
        yield equal
        yield equal * (1 + unit * (torch.arange(n) % 3 - 1).to(dtype))
    yield torch.zeros(n, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2, 3, 6, 7])
def test_constants_are_refused_on_either_side(dtype, n):
    varied = VARIED[:n].to(dtype)
    for constant in constants(dtype, n):
        assert not varies(constant)
        for pair in ((constant, varied), (varied, constant), (constant, constant)):
            with pytest.raises(fk.BatchError, match="are equal, up to rounding, so neither correlation nor slope"):
                fk.calibrate(*pair)
            assert math.isnan(pearson(*pair))
            assert math.isnan(pearson(*map(mean_ranks, pair)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_varies_by_more_than_rounding_is_told(dtype):
    """An offset that leaves three digits or more of the spread changes neither r nor the ranks."""
    scipy = pytest.importorskip("scipy.stats")
    x, y = VARIED.to(dtype), VARIED.square().to(dtype)
    expected = float(scipy.pearsonr(x.double(), y.double()).statistic)
    for offset in (0.0, 1.0, 1e-3 * 0.1 / torch.finfo(dtype).eps):
        moved = x + offset
        assert varies(moved)
        assert pearson(moved, y) == pytest.approx(expected, abs=5e-3)
        assert fk.calibrate(moved, y).pearson == pytest.approx(expected, abs=5e-3)
        assert torch.equal(mean_ranks(moved), mean_ranks(x))
    small = fk.calibrate(1e-9 * x, 1e-9 * y)
    assert small.pearson == pytest.approx(expected, rel=1e-5)


def test_whole_numbers_are_numbers():
    assert pearson(torch.arange(4), torch.arange(4) * 2) == 1
    assert math.isnan(pearson(torch.ones(4, dtype=torch.int64), torch.arange(4)))
