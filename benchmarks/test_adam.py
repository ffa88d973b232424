"""AdamW's diagonal and its step against one plain elementwise pass, and against the optimizer itself."""

from __future__ import annotations

import pytest
import torch

from benchmarks.conftest import Sides
from benchmarks.models import Subject
from fkernel import precond
from fkernel.shapes import Tree

DIAGONALS = ("plain elementwise pass", "adam, frozen", "adam, post-step", "adamw_response")
STEPS = ("torch.optim.AdamW.step", "adamw_step")


def plain_pass(g: Tree, state: precond.AdamWState) -> Tree:
    """The frozen form, g / (√v̂+ε), leaf by leaf: two tensors read, one written, nothing checked."""
    out = {}
    for name, leaf in g.items():
        root = (state.exp_avg_sq[name] / (1 - state.beta2[name] ** state.step[name])).sqrt_().add_(state.eps[name])
        out[name] = torch.div(leaf, root, out=root)
    return out


def diagonal_sides(subject: Subject) -> Sides:
    """P made from the state and applied once, to one gradient."""
    state, g = subject.adamw_state(), subject.vector(1, 0.1)
    return {
        "plain elementwise pass": lambda: plain_pass(g, state),
        "adam, frozen": lambda: precond.adam(state)(g),
        "adam, post-step": lambda: precond.adam(state, {**g})(g),
        "adamw_response": lambda: precond.adamw_response(state, {**g})(g),
    }


def step_sides(subject: Subject) -> Sides:
    """Δθ: taken by the optimizer (which moves its own copy of the parameters), and in its three parts."""
    state, g = subject.adamw_state(), subject.vector(1, 0.1)
    optimizer = torch_optimizer(subject, state, g)
    return {
        "torch.optim.AdamW.step": optimizer.step,
        "adamw_step": lambda: precond.adamw_step(subject.params, {**g}, state),
    }


def torch_optimizer(subject: Subject, state: precond.AdamWState, g: Tree) -> torch.optim.AdamW:
    """Make torch's AdamW with the same parameters (copied), state and gradient."""
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in subject.params.items()}
    first = next(iter(leaves))
    optimizer = torch.optim.AdamW(
        leaves.values(),
        lr=state.lr[first],
        betas=(state.beta1[first], state.beta2[first]),
        eps=state.eps[first],
        weight_decay=state.weight_decay[first],
    )
    for name, leaf in leaves.items():
        leaf.grad = g[name]
        optimizer.state[leaf] = {
            "step": torch.tensor(float(state.step[name])),
            "exp_avg": state.exp_avg[name].clone(),
            "exp_avg_sq": state.exp_avg_sq[name].clone(),
        }
    return optimizer


@pytest.mark.parametrize("side", DIAGONALS)
def test_diagonal(race, subject, side):
    race(side, "AdamW's diagonal", lambda: diagonal_sides(subject), P=subject.size)


@pytest.mark.parametrize("side", STEPS)
def test_adamw_step(race, subject, side):
    race(side, "AdamW's step", lambda: step_sides(subject), P=subject.size)
