"""A ledger closes, its remainder falls as the expansion says, and its floor is the size of real rounding."""

from __future__ import annotations

import pytest
import torch

import fkernel as fk
from fkernel import func, precond, tree
from fkernel.analysis import floor_scale, ledger, rounding_floor, step_sweep
from fkernel.engine.path import Path
from tests.cases import EXAMPLES


@pytest.fixture(params=EXAMPLES, ids=lambda case: case.model_name)
def case(request):
    return request.param


def explained(case, max_norm=0.05, lr=1e-4, path: Path = "midpoint"):
    S, params, E, U = case.engine(fk)
    state = case.state(fk, lr=lr)
    effect, step = fk.explain_step(S, params, E, U, case.weights, state, path=path, max_norm=max_norm)
    return S, params, E, effect, step


def accounted(effect, realised, floor):
    parts = {name: getattr(effect, name) for name in ("batch", "momentum", "decay")}
    return ledger(**parts, realised=realised, floor=floor)


def test_a_ledger_closes_and_its_parts_are_what_they_say(case):
    S, params, E, effect, step = explained(case)
    realised = fk.realised_change(S, params, tree.add(params, step.total), E)
    found = accounted(effect, realised, rounding_floor(S, params, E))
    torch.testing.assert_close(found.closed, realised, rtol=1e-12, atol=1e-15)
    assert effect.clip < 1
    torch.testing.assert_close(found.batch["batch"], effect.batch)
    torch.testing.assert_close(
        effect.batch, effect.clip * (effect.kernel * case.weights).sum(1), rtol=1e-10, atol=1e-15
    )
    curvature = 0.5 * func.curvature(S)(params, E, step.total)  # at θ; the path has it in its parts
    assert (found.remainder.abs() < 1e-2 * curvature.abs().max()).all()
    mid = tree.axpy(0.5, step.total, params)
    for name, part in (("momentum", step.momentum), ("decay", step.decay)):
        torch.testing.assert_close(getattr(found, name), func.jvp(S)(mid, E, part), rtol=1e-9, atol=1e-15)


def test_what_a_ledger_at_the_start_leaves_is_the_curvature(case):
    S, params, E, effect, step = explained(case, path="start")
    realised = fk.realised_change(S, params, tree.add(params, step.total), E)
    found = accounted(effect, realised, rounding_floor(S, params, E))
    torch.testing.assert_close(found.closed, realised, rtol=1e-12, atol=1e-15)
    curvature = 0.5 * func.curvature(S)(params, E, step.total)
    assert (found.remainder - curvature).norm() < 1e-2 * curvature.norm()


@pytest.mark.turns(6)
def test_remainders_of_the_paths_fall_as_the_square_the_cube_and_the_fifth_power(case):
    rates = [1e-3, 5e-4]
    floors, left = [], {path: [] for path in ("start", "midpoint", "gauss2")}
    for path, errors in left.items():
        for lr in rates:
            S, params, E, effect, step = explained(case, lr=lr, path=path)  # pyright: ignore
            realised = fk.realised_change(S, params, tree.add(params, step.total), E)
            floors.append(float(rounding_floor(S, params, E).norm()))
            errors.append(float(accounted(effect, realised, rounding_floor(S, params, E)).remainder.norm()))
    for path, order in (("start", 2), ("midpoint", 3), ("gauss2", 5)):
        big, small = left[path]
        if small > 30 * max(floors):  # above the rounding, the order can be told
            assert torch.tensor(big / small).log2().item() == pytest.approx(order, abs=0.2)
        assert big < {"start": 1, "midpoint": 0.05, "gauss2": 5e-3}[path] * left["start"][0] * 1.01
    assert left["midpoint"][1] > 30 * max(floors)


def test_a_ledger_of_parts_and_departures_closes():
    g = torch.Generator().manual_seed(0)
    values = {name: torch.randn(3, generator=g) for name in ("advantage", "kl", "momentum", "decay", "realised")}
    parts, departures = {name: values.pop(name) for name in ("advantage", "kl")}, {"unexplained": torch.ones(3)}
    found = ledger(batch=parts, **values, floor=torch.zeros(3), departures=departures)
    assert [*found.terms] == ["advantage", "kl", "momentum", "decay", "unexplained", "remainder"]
    torch.testing.assert_close(found.closed, values["realised"])
    known = sum(parts.values()) + values["momentum"] + values["decay"] + 1
    torch.testing.assert_close(found.remainder, values["realised"] - known)


def test_a_floor_s_scale_is_what_is_measured_over_what_is_estimated():
    exact, floor = torch.randn(1000).double(), torch.full((1000,), 1e-3).double()
    changes = exact + 4e-3 * torch.randn(1000).double()
    assert floor_scale(changes, exact, floor) == pytest.approx(4, rel=0.1)
    assert floor_scale(exact, exact, floor) == 1


def test_remainders_fall_as_the_square_and_the_cube_of_the_rate(case):
    S, params, E, _, step = explained(case, lr=1e-3)
    found = step_sweep(S, params, E, step.total, [10**-1.5, 0.1, 10**-0.5, 1.0])
    s = found.scales.log()

    def slope(predicted):
        errors = (predicted - found.realised).norm(dim=1).log()
        return ((s - s.mean()) @ (errors - errors.mean()) / (s - s.mean()).square().sum()).item()

    assert slope(found.first) == pytest.approx(2, abs=0.05)
    assert slope(found.second) == pytest.approx(3, abs=0.1)


def test_the_floor_is_the_size_of_the_rounding_that_is_seen():
    ratios = []
    for case in EXAMPLES:
        S, params, E, _ = case.engine(fk)
        small, towards = tree.cast(params, torch.float32), case.tree(31)
        single = case.model.float()
        apply, _ = func.make_functional(single)
        T = func.sequence_logprob(apply, case.temperature)
        floor = rounding_floor(T, small, E)
        seen = []
        for i in range(12):
            after = tree.add(small, {n: 1e-4 * leaf.float().roll(i, 0) for n, leaf in towards.items()})
            exact = S(tree.cast(after, torch.float64), E) - S(tree.cast(small, torch.float64), E)
            seen.append((T(after, E) - T(small, E)).double() - exact)
        case.model.double()
        ratios.append(torch.stack(seen).square().mean(0).sqrt() / floor)
    found = torch.cat(ratios)
    assert found.min() > 0.1
    assert found.max() < 3, found


def test_a_floor_does_not_depend_on_the_microbatch(case):
    S, params, E, _ = case.engine(fk)
    one, all_ = (rounding_floor(S, params, E, microbatch=m) for m in (1, len(case.E)))
    torch.testing.assert_close(one, all_, rtol=1e-10, atol=0.0)


def test_sizes_that_disagree_are_said(case):
    _, _, _, effect, _ = explained(case)
    one = torch.ones(len(case.E) + 1, dtype=torch.float64)
    with pytest.raises(fk.BatchError, match=r"are of \[2, 2, 2, 3, 3\] sequences|are of \[4, 4, 4, 5, 5\] seq"):
        accounted(effect, one, one)


def test_the_step_at_a_multiple_of_the_rate_is_that_multiple(case):
    _, params, _, U = case.engine(fk)
    g = func.vjp(case.engine(fk)[0])(params, U, case.weights)
    one, ten = (precond.adamw_step(params, {**g}, case.state(fk, lr=lr)).total for lr in (1e-3, 1e-2))
    for name in one:
        torch.testing.assert_close(10 * one[name], ten[name], rtol=1e-12, atol=0.0)
