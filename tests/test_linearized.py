"""An optimizer's update as a preconditioner: it is the derivative of what `torch.optim` really does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fkernel as fk
from fkernel.precond import updates
from fkernel.precond.linearization import linearized, partition

SHAPES = {"w": (4, 3), "b": (5,)}


def tree(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in SHAPES.items()}


THETA, PAST, G, X = tree(0), [tree(i, 0.5) for i in (1, 2, 3)], tree(4), tree(5)


def adamw(optimizer: Any, names: list[str]) -> Any:
    found = {name: optimizer.state[p] for name, p in zip(names, optimizer.param_groups[0]["params"], strict=True)}

    def each(value: float) -> dict[str, float]:
        return dict.fromkeys(names, value)

    return fk.precond.AdamWState(
        {n: int(s["step"]) for n, s in found.items()}, {n: s["exp_avg"].clone() for n, s in found.items()},
        {n: s["exp_avg_sq"].clone() for n, s in found.items()},
        each(1e-3), each(0.9), each(0.999), each(1e-8), each(0.0),
    )  # fmt: skip


def rmsprop(optimizer: Any, names: list[str]) -> Any:
    states = zip(names, optimizer.param_groups[0]["params"], strict=True)
    return updates.RMSpropState({n: optimizer.state[p]["square_avg"].clone() for n, p in states}, lr=1e-3)


def adafactor(optimizer: Any, names: list[str]) -> Any:
    params = dict(zip(names, optimizer.param_groups[0]["params"], strict=True))
    state = {n: optimizer.state[p] for n, p in params.items()}
    return updates.AdafactorState(
        {"w": state["w"]["row_var"].clone()}, {"w": state["w"]["col_var"].clone()},
        {"b": state["b"]["variance"].clone()},
        {n: float(p.detach().square().mean().sqrt()) for n, p in params.items()}, step=len(PAST), lr=1e-3,
    )  # fmt: skip


CASES: dict[str, Any] = {
    "adamw": (lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0), adamw, updates.adamw),
    "rmsprop": (lambda p: torch.optim.RMSprop(p, lr=1e-3), rmsprop, updates.rmsprop),
    "adafactor": (lambda p: torch.optim.Adafactor(p, lr=1e-3, weight_decay=0.0), adafactor, updates.adafactor),
}


def really(make: Any, g: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Any]:
    """What torch's optimizer moves when it is given g after its past; and it, before that step."""
    params = {name: leaf.clone().requires_grad_() for name, leaf in THETA.items()}
    optimizer = make(list(params.values()))
    for past in PAST:
        for name, p in params.items():
            p.grad = past[name].clone()
        optimizer.step()
    before = {name: p.detach().clone() for name, p in params.items()}
    state = READERS[make](optimizer, [*params])
    for name, p in params.items():
        p.grad = g[name].clone()
    optimizer.step()
    return {name: p.detach() - before[name] for name, p in params.items()}, state


READERS = {make: read for make, read, _ in CASES.values()}
"""{what makes an optimizer: what reads its state}."""


@pytest.mark.parametrize("name", CASES)
def test_updates_are_what_torch_does(name):
    make, _, update = CASES[name]
    moved, state = really(make, G)
    for key, leaf in update(G, state).items():
        torch.testing.assert_close(leaf, moved[key], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", CASES)
def test_linearized_is_the_derivative_of_torchs_own_step(name):
    make, _, update = CASES[name]
    _, state = really(make, G)
    h = 1e-6
    plus, minus = (really(make, {k: G[k] + s * h * X[k] for k in G})[0] for s in (1, -1))
    for key, leaf in linearized(update, G, state)(X).items():
        torch.testing.assert_close(leaf, -(plus[key] - minus[key]) / (2 * h), rtol=1e-5, atol=1e-10)


def test_rows_are_vectors_one_by_one():
    _, state = really(CASES["adafactor"][0], G)
    P = linearized(updates.adafactor, G, state)
    rows = P({name: torch.stack([X[name], 2 * X[name], G[name]]) for name in X})
    for i, x in enumerate((X, {k: 2 * v for k, v in X.items()}, G)):
        for name, leaf in P(x).items():
            torch.testing.assert_close(rows[name][i], leaf)


def test_with_v_held_adamw_is_p_step():
    """β2 → 1 takes v' out of the derivative."""
    _, state = really(CASES["adamw"][0], G)
    held = fk.precond.AdamWState(**{**vars(state), "beta2": dict.fromkeys(G, 1 - 1e-9)})
    x = linearized(updates.adamw, G, held)(X)
    for name, leaf in fk.precond.adamw_response(held, {**G})(X).items():
        torch.testing.assert_close(x[name], leaf, rtol=1e-3, atol=1e-12)


def test_lion_is_flat_unless_its_sign_is_smooth():
    zero = {name: torch.zeros_like(leaf) for name, leaf in G.items()}
    hard = linearized(updates.lion, G, updates.LionState(zero))(X)
    soft = linearized(updates.lion, G, updates.LionState(zero, width=0.1))(X)
    assert all(not leaf.any() for leaf in hard.values())
    assert all(leaf.abs().min() > 0 for leaf in soft.values())


def test_muon_is_for_matrices_and_others_go_elsewhere():
    with pytest.raises(fk.OptimizerStateError, match=r"'b' has shape \[5\]"):
        updates.muon(G, updates.MuonState({name: torch.zeros_like(leaf) for name, leaf in G.items()}))
    state = updates.MuonState({"w": torch.zeros(4, 3, dtype=torch.float64)}, lr=1.0)
    w = {"w": G["w"]}
    h = 1e-6
    plus, minus = (updates.muon({"w": G["w"] + s * h * X["w"]}, state)["w"] for s in (1, -1))
    P = partition({("w",): linearized(updates.muon, w, state), ("b",): fk.precond.identity()})
    torch.testing.assert_close(P(X)["w"], -(plus - minus) / (2 * h), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(P(X)["b"], X["b"])
    real = torch.optim.Muon([torch.nn.Parameter(THETA["w"].clone())], lr=1.0, weight_decay=0.0)
    (p,) = real.param_groups[0]["params"]
    p.grad = G["w"].clone()
    real.step()
    torch.testing.assert_close(updates.muon(w, state)["w"], p.detach() - THETA["w"], rtol=0.05, atol=0.02)  # bfloat16
    with pytest.raises(fk.TreeError, match="more than one part"):
        partition({("w",): fk.precond.identity(), ("w", "b"): fk.precond.identity()})
