"""`explain_step` with any optimizer: the parts are its step, and contributions add up to what happened."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fkernel as fk
from fkernel import precond, tree
from fkernel.precond import fresh_state, optimizer_step
from tests.cases import EXAMPLES

KINDS: dict[str, dict[str, Any]] = {
    "adam": {"lr": 1e-4, "weight_decay": 0.1, "amsgrad": True},
    "nadam": {"lr": 1e-4},
    "sgd": {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.1},
    "rmsprop": {"lr": 1e-4},
    "lion": {"lr": 1e-5, "weight_decay": 0.1},
    "adafactor": {"lr": 1e-4},
}


@pytest.fixture(params=EXAMPLES, ids=lambda case: case.model_name)
def case(request):
    return request.param


@pytest.mark.parametrize("kind", KINDS)
def test_contributions_add_up_to_the_step_of_any_optimizer(case, kind):
    S, params, E, U = case.engine(fk)
    state = fresh_state(kind, params, **KINDS[kind])
    effect, step = fk.explain_step(S, params, E, U, case.weights, state, max_norm=0.05)
    g, _, _ = fk.loss_gradient(S, params, U, case.weights, max_norm=0.05)
    own = optimizer_step(params, {**g}, state)
    for name, leaf in own.total.items():
        known = (
            g[name].abs() > 1e-12
        )  # attention does not see its keys' bias: rounding has a sign there, and no meaning
        torch.testing.assert_close(step.total[name][known], leaf[known], rtol=1e-8, atol=1e-16)
    realised = fk.realised_change(S, params, tree.add(params, step.total), E)
    assert effect.predicted.norm() > 0
    assert (effect.predicted - realised).norm() < 2e-3 * realised.norm()
    torch.testing.assert_close(effect.contributions.sum(1), effect.batch)
    assert effect.batch.norm() > 0.1 * realised.norm()


def test_muon_for_matrices_with_adamw_for_the_rest(case):
    S, params, E, U = case.engine(fk)
    matrices = {name: leaf for name, leaf in params.items() if leaf.ndim == 2}
    rest = {name: leaf for name, leaf in params.items() if leaf.ndim != 2}
    state = precond.MixedState((fresh_state("muon", matrices, lr=1e-4), fresh_state("adamw", rest, lr=1e-4)))
    effect, step = fk.explain_step(S, params, E, U, case.weights, state)
    realised = fk.realised_change(S, params, tree.add(params, step.total), E)
    assert (effect.predicted - realised).norm() < 2e-3 * realised.norm()


def test_a_secant_on_sums_that_cancel_is_told(case):
    _, params, _, _ = case.engine(fk)
    g = {name: torch.full_like(leaf, 1e-3) for name, leaf in params.items()}
    D = {name: torch.ones_like(leaf) for name, leaf in params.items()}
    large, own = ({name: k * leaf.abs() for name, leaf in g.items()} for k in (1000.0, 1.0))
    assert precond.cancellation(g, large, D) == pytest.approx(1.0)
    assert precond.cancellation(g, own, D) == 0.0
