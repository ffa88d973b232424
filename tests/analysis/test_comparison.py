"""Influences under other preconditioners: the optimizer's own meets what happened, others less."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import fkernel as fk
from fkernel import func, precond, tree
from fkernel.analysis import compare
from fkernel.analysis.comparison import correlation, ranks
from fkernel.precond.alternatives import NAMES
from tests.cases import EXAMPLES, Case

CASE = Case("own", 5, ((3, 4), (1, 6), (5, 2), (2, 2)), tuple((1 + i % 4, 1 + i % 5) for i in range(14)), 0.7, 4)


def situation(case, lr=1e-5):
    S, params, E, U = case.engine(fk)
    state = case.state(fk, lr=lr)
    g, _, _ = fk.loss_gradient(S, params, U, case.weights)
    step = precond.adamw_step(params, {**g}, state)
    realised = fk.realised_change(S, params, tree.add(params, step.total), E)
    others = func.jvp(S)(params, E, tree.add(step.momentum, step.decay))
    return S, params, E, tree.scale(-1.0, g), g, state, realised, others


def test_the_optimizers_own_meets_what_happened_and_others_less():
    S, params, E, ascent, g, state, realised, others = situation(CASE)
    P = precond.alternatives(params, g, state)
    found = compare(S, params, E, ascent, P, realised, others)
    assert [*found] == [*NAMES]
    assert found["post-step"].of_batch > 0.999999
    assert found["post-step"].rank > 0.99
    assert all(found["post-step"].of_batch >= agreement.of_batch - 1e-9 for agreement in found.values())
    assert found["identity"].of_batch < 0.999
    for agreement in found.values():
        assert -1 <= agreement.realised <= 1


def test_an_influence_is_the_kernel_times_the_weights():
    S, params, E, ascent, g, state, realised, others = situation(CASE)
    P = precond.alternatives(params, g, state, which=["adafactor", "lion", "muon", "rmsprop", "adamw"])
    U = CASE.batch(fk, CASE.U)
    found = compare(S, params, E, ascent, P, realised, others)
    for name, each in P.items():
        expected = fk.kernel(S, params, E, U, each) @ CASE.weights
        torch.testing.assert_close(found[name].influence, expected, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("case", EXAMPLES, ids=lambda case: case.model_name)
def test_muon_moves_the_matrices_it_is_given_and_adamw_the_rest(case):
    _, params, _, ascent, g, state, _, _ = situation(case)
    matrices = [name for name, leaf in params.items() if leaf.ndim == 2 and "embed" not in name]
    found = precond.alternatives(params, g, state, matrices, ["muon", "post-step"])
    own = found["post-step"](ascent)
    for name, leaf in found["muon"](ascent).items():
        same = torch.allclose(leaf, own[name], rtol=1e-10, atol=0)
        assert same == (name not in matrices)


def test_parameters_keep_their_own_learning_rates():
    """A group that hardly learns moves hardly anything, whatever the preconditioner."""
    S, params, E, U = CASE.engine(fk)
    lr = {name: 1e-5 if i % 2 else 1e-8 for i, name in enumerate(params)}
    state = replace(CASE.state(fk), lr=lr)
    g, _, _ = fk.loss_gradient(S, params, U, CASE.weights)
    step = precond.adamw_step(params, {**g}, state)
    realised = fk.realised_change(S, params, tree.add(params, step.total), E)
    others = func.jvp(S)(params, E, tree.add(step.momentum, step.decay))
    P = precond.alternatives(params, g, state)
    assert compare(S, params, E, tree.scale(-1.0, g), P, realised, others)["post-step"].of_batch > 0.999999
    ones = {name: torch.ones_like(leaf) for name, leaf in params.items()}
    for name in ("identity", "rmsprop", "lion"):
        usual = precond.alternatives(params, g, replace(state, lr=dict.fromkeys(lr, 1e-5)), which=[name])[name](ones)
        for key, leaf in P[name](ones).items():
            torch.testing.assert_close(leaf, usual[key] * (lr[key] / 1e-5), rtol=1e-10, atol=0.0)


def test_ranks_are_spearmans():
    x, y = torch.tensor([1.0, 5.0, 3.0, 3.0]), torch.tensor([2.0, 30.0, 10.0, 11.0])
    scipy = pytest.importorskip("scipy.stats")
    assert correlation(ranks(x), ranks(y)) == pytest.approx(scipy.spearmanr(x, y).statistic)
    assert math.isnan(correlation(x, torch.ones(4)))


def test_mistakes_are_said():
    S, params, E, ascent, g, state, realised, others = situation(CASE)
    with pytest.raises(fk.BatchError, match="realised is of 14 sequences, others of 3"):
        compare(S, params, E, ascent, {}, realised, others[:3])
    with pytest.raises(fk.OptimizerStateError, match="'sgd' is no preconditioner that is known; expected identity"):
        precond.alternatives(params, g, state, which=["sgd"])
    fresh = precond.adamw_init(params, lr=0.1)
    with pytest.raises(fk.OptimizerStateError, match="at step 0"):
        precond.alternatives(params, g, fresh, which=["frozen"])
    assert len(precond.alternatives(params, g, fresh, which=[n for n in NAMES if n != "frozen"])) == len(NAMES) - 1
