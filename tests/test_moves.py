"""Preconditioners made of an optimizer's move: what they make of g is what `torch.optim` really makes of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import fkernel as fk
from fkernel import precond
from fkernel.precond import broyden, linearized, secant, updates
from tests.test_linearized import CASES, THETA, G, X, really

ZERO = {name: torch.zeros_like(leaf) for name, leaf in G.items()}
LION = updates.LionState({name: 0.1 * leaf for name, leaf in X.items()}, lr=1.0)


def add(one: Any, other: Any, scale: float = 1.0) -> Any:
    return {name: leaf + scale * other[name] for name, leaf in one.items()}


def close(one: Any, other: Any, rtol: float = 1e-12, atol: float = 1e-14) -> None:
    assert [*one] == [*other]
    for name, leaf in one.items():
        torch.testing.assert_close(leaf, other[name], rtol=rtol, atol=atol)


def shares() -> Any:
    """Four sequences whose gradients add up to G; some of them are far larger than their sum."""
    rows = {name: torch.stack([20 * X[name], -19 * X[name], 3 * leaf, -2 * leaf - X[name]]) for name, leaf in G.items()}
    close({name: leaf.sum(0) for name, leaf in rows.items()}, G)
    return rows


def own_rounded(g: Any, state: Any) -> Any:
    """Signed descent whose steps are rounded to bfloat16, written without regard for derivatives."""
    return {name: (-0.01 * (leaf.sign() * leaf.abs() ** 0.3 + 0.1)).bfloat16().to(leaf) for name, leaf in g.items()}


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_what_sequences_did_adds_up_to_torchs_own_move(name):
    """Σ_u P(−g_u) = F(g) − F(0), both F steps that torch took."""
    make, _, update = CASES[name]
    (moved, state), (coasted, _) = really(make, G), really(make, ZERO)
    P = secant(update, G, state)
    whole = add(moved, coasted, -1.0)
    close({n: -leaf.sum(0) for n, leaf in P(shares()).items()}, whole, rtol=1e-9, atol=1e-13)
    close(P({n: -leaf for n, leaf in G.items()}), whole, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(("update", "state"), [(updates.lion, LION), (own_rounded, None)], ids=["lion", "rounded"])
def test_what_sequences_did_adds_up_to_the_move_of_an_optimizer_with_jumps(update, state):
    whole = add(update(G, state), update(ZERO, state), -1.0)
    assert any(leaf.any() for leaf in whole.values())
    P = secant(update, G, state)
    assert isinstance(P, precond.Diagonal)
    close({n: -leaf.sum(0) for n, leaf in P(shares()).items()}, whole, rtol=1e-9, atol=1e-13)


def test_a_coordinate_without_gradient_has_the_derivative():
    make, _, update = CASES["adamw"]
    _, state = really(make, G)
    holes = {name: leaf * (torch.arange(leaf.numel()).reshape(leaf.shape) % 2) for name, leaf in G.items()}
    found, h = secant(update, holes, state)(X), 1e-6
    slope = {n: -(up - down) / (2 * h) for (n, up), down in zip(
        update(add(holes, X, h), state).items(), update(add(holes, X, -h), state).values(), strict=True)}  # fmt: skip
    for name, g in holes.items():
        torch.testing.assert_close(found[name][g == 0], slope[name][g == 0], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
@pytest.mark.parametrize("make", [secant, linearized])
def test_a_coordinate_that_was_never_seen_has_what_the_optimizer_would_do(name, make):
    """v = 0 and g = 0, as of a token that was never looked up: the move of a gradient that is next to nothing."""
    params = {"w": torch.ones(3, 2, dtype=torch.float64)}
    state, g = precond.adamw_init(params, lr=0.1, eps=1e-3), {"w": torch.zeros(3, 2, dtype=torch.float64)}
    g["w"][0] = 1.0
    past = state if name == "adamw" else updates.RMSpropState(state.exp_avg_sq, lr=0.1, eps=1e-3)
    update, h = CASES[name][2], 1e-12
    found = make(update, g, past)({"w": torch.ones_like(g["w"])})["w"]
    expected = -(update({"w": g["w"] + h}, past)["w"] - update(g, past)["w"]) / h
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-6, atol=0.0)
    assert torch.isfinite(found).all()


def muon_case(shape: tuple[int, int], nesterov: bool) -> Any:
    """Torch's Muon after two steps, in float64 throughout; its move on g and on nothing; and its state."""
    draw = torch.Generator().manual_seed(3)
    past = [torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(3)]

    def stepped(g: torch.Tensor) -> Any:
        p = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        optimizer = torch.optim.Muon([p], lr=0.3, weight_decay=0.0, momentum=0.8, nesterov=nesterov)
        for each in past[:2]:
            p.grad = each.clone()
            optimizer.step()
        before, b = p.detach().clone(), optimizer.state[p]["momentum_buffer"].clone()
        p.grad = g.clone()
        optimizer.step()
        return p.detach() - before, updates.MuonState({"w": b}, lr=0.3, momentum=0.8, nesterov=nesterov)

    (moved, state), (coasted, _) = stepped(past[2]), stepped(torch.zeros_like(past[2]))
    return {"w": past[2]}, {"w": moved}, {"w": coasted}, state


@pytest.mark.parametrize("shape", [(4, 3), (3, 4), (8, 2)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs_to_the_last_digits_where_torch_is_let_compute_in_float64(monkeypatch, shape, nesterov):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    g, moved, coasted, state = muon_case(shape, nesterov)
    close(updates.muon(g, state), moved, rtol=1e-12, atol=1e-14)
    whole = add(moved, coasted, -1.0)
    close(broyden(updates.muon, g, state)({"w": -g["w"]}), whole, rtol=1e-10, atol=1e-12)


def test_adafactors_whole_move_is_met_and_its_derivative_is_kept_beside_it():
    make, _, update = CASES["adafactor"]
    (moved, state), (coasted, _) = really(make, G), really(make, ZERO)
    P, J = broyden(update, G, state), linearized(update, G, state)
    close({n: -leaf for n, leaf in P(G).items()}, add(moved, coasted, -1.0), rtol=1e-9, atol=1e-14)
    close({n: -leaf.sum(0) for n, leaf in P(shares()).items()}, add(moved, coasted, -1.0), rtol=1e-9, atol=1e-13)
    beside = {n: x - G[n] * (x * G[n]).sum() / G[n].square().sum() for n, x in X.items()}
    close(P(beside), J(beside), rtol=1e-9, atol=1e-14)
    rows = P({n: torch.stack([x, G[n]]) for n, x in X.items()})
    for i, x in enumerate((X, G)):
        close({n: leaf[i] for n, leaf in rows.items()}, P(x), rtol=1e-12, atol=1e-15)


def test_a_parameter_without_gradient_is_no_nan():
    state = updates.MuonState({"w": torch.zeros(3, 2), "u": torch.zeros(3, 2)})
    g = {"w": torch.zeros(3, 2), "u": torch.ones(3, 2)}
    found = broyden(updates.muon, g, state)({"w": torch.zeros(3, 2), "u": torch.ones(3, 2)})
    assert not found["w"].any()
    assert torch.isfinite(found["u"]).all()
    fresh = updates.AdafactorState({}, {}, {"w": torch.zeros(3)}, {"w": 1.0})
    assert torch.isfinite(broyden(updates.adafactor, {"w": torch.zeros(3)}, fresh)({"w": torch.zeros(3)})["w"]).all()


def test_each_parameter_has_its_own_rates():
    """RMSprop's α and ε and Adafactor's steps, in groups of torch's own optimizers."""
    rates = {"w": (0.9, 1e-3), "b": (0.5, 1e-1)}
    params = {name: torch.nn.Parameter(leaf.clone()) for name, leaf in THETA.items()}
    groups = [{"params": [p], "alpha": rates[n][0], "eps": rates[n][1]} for n, p in params.items()]
    optimizer = torch.optim.RMSprop(groups, lr=1e-2)
    v = {name: X[name].square() for name in params}
    for name, p in params.items():
        p.grad = G[name].clone()
        optimizer.state[p] = {"step": torch.tensor(1.0), "square_avg": v[name].clone()}
    optimizer.step()
    moved = {name: p.detach() - THETA[name] for name, p in params.items()}
    alpha, eps = ({name: each[i] for name, each in rates.items()} for i in (0, 1))
    close(updates.rmsprop(G, updates.RMSpropState(v, 1e-2, alpha, eps)), moved, rtol=1e-9, atol=1e-15)

    # and as made of AdamW's state, whose v̂ is v here but for the bias
    state = replace(precond.adamw_init(THETA, lr=1e-2), exp_avg_sq=v, beta2=alpha, eps=eps, step={"w": 400, "b": 100})
    assert max(alpha[n] ** state.step[n] for n in alpha) < 1e-15
    ascent = {name: -leaf for name, leaf in G.items()}
    found = precond.alternatives(THETA, G, state, which=["rmsprop", "adafactor"])
    close(found["rmsprop"](ascent), moved, rtol=1e-9, atol=1e-15)
    for name in THETA:  # alone, each has the steps that are its own
        alone = replace(state, **{field: {name: getattr(state, field)[name]} for field in vars(state)})
        other = precond.alternatives({name: THETA[name]}, {name: G[name]}, alone, which=["adafactor"])["adafactor"]
        close({name: found["adafactor"](ascent)[name]}, other({name: ascent[name]}), rtol=1e-12, atol=0.0)


def test_an_optimizer_that_divides_by_zero_is_refused():
    params = {"w": torch.zeros(2)}
    state = precond.adamw_init(params, lr=0.1, eps=0.0)
    with pytest.raises(fk.OptimizerStateError, match=r"move of .w. is not finite in 2 of 2 coordinates"):
        secant(updates.adamw, {"w": torch.ones(2)}, state)
    with pytest.raises(fk.TreeError, match="the tree to precondition"):
        broyden(updates.adamw, params, replace(state, eps={"w": 1e-8}))({"other": torch.ones(2)})
