"""Influences under other preconditioners: the optimizer's own meets what happened, others less."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import fkernel as fk
from fkernel import func, precond, tree
from fkernel.analysis import compare
from fkernel.engine.correlation import mean_ranks, pearson
from fkernel.precond import updates
from fkernel.precond.optimizers import NAMES
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
    moved = {name: agreement for name, agreement in found.items() if agreement.influence.any()}
    assert {*NAMES} - {*moved} == {"lion"}  # the momentum of this state is so large that no sign turns
    assert math.isnan(found["lion"].realised)
    assert all(found["post-step"].of_batch >= agreement.of_batch - 1e-9 for agreement in moved.values())
    assert found["identity"].of_batch < 0.999
    for agreement in moved.values():
        assert -1 <= agreement.realised <= 1


@pytest.mark.turns(6)
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


def first_step():
    """What is compared at t = 0, where AdamW, RMSprop, Adafactor and Lion do not see the scale of g."""
    S, params, E, U = CASE.engine(fk)
    state = precond.adamw_init(params, lr=1e-6, eps=1e-60)
    g, _, _ = fk.loss_gradient(S, params, U, CASE.weights)
    step = precond.adamw_step(params, {**g}, state)
    realised = fk.realised_change(S, params, tree.add(params, step.total), E)
    return S, params, E, g, state, realised, func.jvp(S)(params, E, step.decay)


def test_at_the_first_step_each_optimizer_is_told_by_its_move():
    S, params, E, g, state, realised, others = first_step()
    ascent = tree.scale(-1.0, g)
    P = precond.alternatives(params, g, state, which=[name for name in NAMES if name != "frozen"])
    found = compare(S, params, E, ascent, P, realised, others)
    signed = {name: -1e-6 * leaf.sign() for name, leaf in g.items()}
    for name in ("post-step", "adamw", "lion"):  # all of them take a step of lr against the sign
        for key, leaf in P[name](ascent).items():
            torch.testing.assert_close(leaf, signed[key], rtol=1e-9, atol=1e-15)
        assert found[name].of_batch > 0.999999
    for key, leaf in P["rmsprop"](ascent).items():  # v' = (1−β2) g²
        torch.testing.assert_close(leaf, signed[key] / (1 - state.beta2[key]) ** 0.5, rtol=1e-9, atol=1e-15)
    for name, share in P["adafactor"](ascent).items():
        zero = updates.AdafactorState(
            {name: g[name].mean(-1, keepdim=True) * 0}, {name: g[name].mean(-2, keepdim=True) * 0} if g[name].ndim > 1
            else {}, {name: 0 * g[name]}, {name: float(params[name].square().mean().sqrt())},
        )  # fmt: skip
        expected = updates.adafactor({name: g[name]}, zero)[name]
        torch.testing.assert_close(share, 1e-6 * expected, rtol=1e-9, atol=1e-20)


def test_an_influence_of_rounding_is_held_against_nothing():
    S, params, E, g, state, realised, others = first_step()
    ascent = tree.scale(-1.0, g)
    P: dict[str, precond.Preconditioner] = {"nothing": lambda x: tree.scale(0.0, x)}
    factored = {name: leaf for name, leaf in g.items() if leaf.ndim > 1}
    past = updates.AdafactorState(
        {name: leaf.mean(-1, keepdim=True) * 0 for name, leaf in factored.items()},
        {name: leaf.mean(-2, keepdim=True) * 0 for name, leaf in factored.items()},
        {name: leaf * 0 for name, leaf in g.items() if leaf.ndim < 2}, dict.fromkeys(g, 1.0),
    )  # fmt: skip
    for name, update, before in (
        ("adamw", updates.adamw, state),
        ("adafactor", updates.adafactor, past),
    ):
        P[name] = precond.linearized(update, g, before)
    for one in compare(S, params, E, ascent, P, realised, others).values():
        assert all(math.isnan(r) for r in (one.realised, one.of_batch, one.rank))
    short = tree.cast(ascent, torch.float32)
    alone = compare(S, tree.cast(params, torch.float32), E, short, {"I": precond.identity()}, realised, others)["I"]
    assert not math.isnan(alone.of_batch)  # nor is what rounding spares lost in float32


def test_ranks_are_spearmans():
    x, y = torch.tensor([1.0, 5.0, 3.0, 3.0]), torch.tensor([2.0, 30.0, 10.0, 11.0])
    scipy = pytest.importorskip("scipy.stats")
    assert pearson(mean_ranks(x), mean_ranks(y)) == pytest.approx(scipy.spearmanr(x, y).statistic)
    assert math.isnan(pearson(x, torch.ones(4)))


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
