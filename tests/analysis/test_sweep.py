"""Over decades of step size: the floor at one end, the range that holds, the breakdown at the other."""

from __future__ import annotations

import pytest
import torch

import fkernel as fk
from fkernel.analysis import DECADES, Sweep, step_sweep
from tests.cases import EXAMPLES


def test_eight_decades_have_a_floor_a_range_and_a_breakdown():
    case = EXAMPLES[0]
    model = case.model.float()
    apply, params = fk.func.make_functional(model)
    S, E = fk.func.sequence_logprob(apply, case.temperature), case.batch(fk, case.E)
    step = {name: 1e-3 * leaf.float() for name, leaf in case.tree(32).items()}
    found = step_sweep(S, params, E, step)
    model.double()
    assert found.scales[-1] / found.scales[0] == pytest.approx(1e8)
    first, second = found.error("first"), found.error("second")
    assert first[0] < 10 * found.noise[0]  # rounding is all there is
    assert first[-1] > 0.01
    first_holds, second_holds = found.holds(0.01), found.holds(0.01, "second")
    assert first_holds is not None
    assert second_holds is not None
    low, high = first_holds
    assert found.scales[0] < low < high < found.scales[-1]
    assert second_holds[1] > high
    inside = (found.scales >= low) & (found.scales <= high)
    assert (first[inside] <= 0.01).all()
    assert second[inside].min() <= first[inside].min()


def test_no_range_is_none():
    s, off = torch.tensor([1.0, 10.0]), torch.ones(2, 1)
    assert Sweep(s, off, off, 2 * off, torch.zeros(1)).holds(0.01) is None


def test_what_overflows_is_nan_and_no_error():
    f = lambda params, x: (x @ params["w"]).exp()  # noqa: E731
    found = step_sweep(f, {"w": torch.zeros(1)}, torch.ones(2, 1), {"w": torch.ones(1)}, [1.0, 1000.0])
    assert found.realised[0].isfinite().all()
    assert found.realised[1].isnan().all()
    assert found.holds(0.9) == (1.0, 1.0)


@pytest.mark.parametrize("scales", [[], [0.0], [-1.0, 1.0]])
def test_scales_are_positive(scales):
    f = lambda params, x: x @ params["w"]  # noqa: E731
    with pytest.raises(fk.BatchError, match="scales are"):
        step_sweep(f, {"w": torch.zeros(1)}, torch.ones(1, 1), {"w": torch.ones(1)}, scales)


def test_the_default_is_eight_decades():
    assert DECADES[-1] / DECADES[0] == pytest.approx(1e8)
