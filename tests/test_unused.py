"""What a function never uses: torch has no gradient for it, and its optimizer leaves it alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fkernel as fk
from fkernel import func, precond
from fkernel.analysis import alternative_step
from fkernel.func import unused_parameters
from tests.cases import EXAMPLES

CHOSEN = torch.tensor([0, 2])  # no token goes to the second expert of three


def f(params: Any, batch: Any) -> torch.Tensor:
    """Two experts of three, a gate that is cut off from the gradient, and nothing of the rest."""
    x, expert = batch["x"], batch["expert"]
    mixed = (params["experts"][expert] * x).sum(-1) + (params["w"] * params["gate"].detach()) @ torch.ones(2).to(x)
    return mixed.tanh()


def given() -> Any:
    draw = torch.Generator().manual_seed(0)
    shapes = {"w": (2,), "experts": (3, 2), "gate": (2,), "other": (2, 2)}
    params = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    past = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    batch = {"x": torch.randn(4, 2, generator=draw, dtype=torch.float64), "expert": CHOSEN.repeat(2)}
    return params, past, batch, torch.tensor([0.5, -1.0, 0.3, 0.7], dtype=torch.float64)


def really(params: Any, past: Any, batch: Any, weights: torch.Tensor) -> Any:
    """Torch's AdamW: one step in which everything had a gradient, then one on f; the state between, and the move."""
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    optimizer = torch.optim.AdamW([*leaves.values()], lr=1e-2, weight_decay=0.1)
    for name, leaf in leaves.items():
        leaf.grad = past[name].clone()
    optimizer.step()
    optimizer.zero_grad()
    before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    kept = {name: optimizer.state[leaf] for name, leaf in leaves.items()}

    def each(value: float) -> dict[str, float]:
        return dict.fromkeys(leaves, value)

    state = precond.AdamWState(
        dict.fromkeys(leaves, 1), {n: s["exp_avg"].clone() for n, s in kept.items()},
        {n: s["exp_avg_sq"].clone() for n, s in kept.items()},
        each(1e-2), each(0.9), each(0.999), each(1e-8), each(0.1),
    )  # fmt: skip
    (-(weights * f(leaves, batch)).sum()).backward()
    none = {name for name, leaf in leaves.items() if leaf.grad is None}
    optimizer.step()
    return before, state, none, {name: leaf.detach() - before[name] for name, leaf in leaves.items()}


def test_a_step_leaves_alone_what_torch_leaves_alone():
    before, state, none, moved = really(*given())
    _, _, batch, weights = given()
    assert none == {"gate", "other"} == unused_parameters(f, before, batch)
    effect, step = fk.explain_step(f, before, batch, batch, weights, state)
    for name, leaf in step.total.items():
        torch.testing.assert_close(leaf, moved[name], rtol=1e-10, atol=1e-16)
    assert not step.total["other"].any()
    assert step.momentum["experts"][1].all()  # chosen by no token: its gradient is 0, and momentum and decay move it
    after = {name: leaf + moved[name] for name, leaf in before.items()}
    realised = fk.realised_change(f, before, after, batch)
    torch.testing.assert_close(effect.predicted, realised, rtol=1e-3, atol=1e-6)


def test_a_function_of_nothing_uses_nothing():
    params, _, batch, _ = given()
    assert unused_parameters(lambda p, b: b["x"].sum(1), params, batch) == {*params}


@pytest.mark.parametrize("case", EXAMPLES, ids=lambda case: case.model_name)
def test_a_language_model_uses_all_of_its_parameters_but_those_beside_it(case):
    S, params, _, U = case.engine(fk)
    assert not unused_parameters(S, params, U)
    beside = {**params, "value_head": torch.ones(2, dtype=torch.float64)}
    with_head = func.Objective(lambda p, b: S({k: v for k, v in p.items() if k in params}, b), S.check, "S")
    assert unused_parameters(with_head, beside, U) == {"value_head"}
    assert all(not leaf.requires_grad for leaf in params.values())


def test_an_observables_step_leaves_alone_what_torch_leaves_alone():
    """The observable uses what the loss does not: it is moved by what moved, and by nothing else."""
    before, state, _, moved = really(*given())
    _, _, batch, weights = given()

    def observable(params: Any, x: Any) -> torch.Tensor:
        return f(params, x) + params["other"].sum() + params["gate"].sum()

    effect, _ = fk.explain_step(f, before, batch, batch, weights, state, rows=observable)
    after = {name: leaf + moved[name] for name, leaf in before.items()}
    realised = fk.realised_change(observable, before, after, batch)
    torch.testing.assert_close(effect.predicted, realised, rtol=1e-3, atol=1e-6)
    assert float(realised.abs().min()) > 1e-4


def test_a_step_that_was_not_taken_leaves_it_alone_too():
    before, state, none, moved = really(*given())
    _, _, batch, weights = given()
    g, _, _ = fk.loss_gradient(f, before, batch, weights)
    taken = {**g, **dict.fromkeys(none)}
    other = alternative_step(before, func.vjp(f)(before, batch, weights), state, taken)  # the same weights again
    for step in (other.exact, other.frozen):
        for name, leaf in step.total.items():
            torch.testing.assert_close(leaf, moved[name], rtol=1e-9, atol=1e-16)
    flipped = alternative_step(before, func.vjp(f)(before, batch, -weights), state, taken)
    assert all(not flipped.exact.total[name].any() and not flipped.frozen.total[name].any() for name in none)
