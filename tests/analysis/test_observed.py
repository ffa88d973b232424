"""Other observables than log π: contributions of U, momentum and decay add up to the step taken."""

from __future__ import annotations

import pytest
import torch

import fkernel as fk
from fkernel import func, tree
from fkernel.engine.path import nodes_of
from tests.cases import EXAMPLES


@pytest.fixture(params=EXAMPLES, ids=lambda case: case.model_name)
def case(request):
    return request.param


def observables(case, params, E):
    apply, _ = func.make_functional(case.model)
    flipped = func.Sequences(*(leaf.flip(0) for leaf in E))
    rewards = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(len(case.E), 2)
    reference = tree.axpy(0.1, case.tree(61), params)
    return {
        "entropy": (func.mean_entropy(apply), E),
        "KL": (func.kl_divergence(apply, reference), E),
        "odds": (func.log_odds(apply), func.Pair(E, flipped)),
        "reward": (func.expected_reward(apply), func.Answers((E, flipped), rewards)),
    }


@pytest.mark.parametrize("name", ["entropy", "KL", "odds", "reward"])
def test_a_prediction_meets_the_step_that_is_taken(case, name):
    S, params, E, U = case.engine(fk)
    f, batch = observables(case, params, E)[name]
    weights, state = case.weights, case.state(fk, lr=1e-4)
    effect, _ = fk.explain_step(S, params, batch, U, weights, state, max_norm=0.05, rows=f)
    _, step = fk.explain_step(S, params, E, U, weights, state, max_norm=0.05)
    realised = fk.realised_change(f, params, tree.add(params, step.total), batch)
    first = func.jvp(f)(params, batch, step.total)
    assert (first - realised).norm() < 0.1 * realised.norm()
    assert (effect.predicted - realised).norm() < 0.1 * (first - realised).norm()
    mid = tree.axpy(0.5, step.total, params)
    for part in ("batch", "momentum", "decay"):
        expected = func.jvp(f)(mid, batch, getattr(step, part))
        torch.testing.assert_close(getattr(effect, part), expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", ["entropy", "KL", "odds", "reward"])
def test_at_the_start_it_is_the_first_order(case, name):
    S, params, E, U = case.engine(fk)
    f, batch = observables(case, params, E)[name]
    state = case.state(fk, lr=1e-4)
    effect, step = fk.explain_step(S, params, batch, U, case.weights, state, path="start", rows=f)
    for part in ("batch", "momentum", "decay"):
        expected = func.jvp(f)(params, batch, getattr(step, part))
        torch.testing.assert_close(getattr(effect, part), expected, rtol=1e-9, atol=1e-14)


def test_log_probability_is_one_of_them(case):
    S, params, E, U = case.engine(fk)
    state = case.state(fk)
    ours, _ = fk.explain_step(S, params, E, U, case.weights, state)
    found, _ = fk.explain_step(S, params, E, U, case.weights, state, rows=S)
    assert found.path == ours.path == "midpoint"
    for mine, other in zip(found[:4], ours[:4], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-14)


def test_the_log_odds_are_the_difference_of_two_rows(case):
    _, params, E, U = case.engine(fk)
    f, pair = observables(case, params, E)["odds"]
    state = case.state(fk)
    S = func.sequence_logprob(func.make_functional(case.model)[0])
    ours, _ = fk.explain_step(S, params, E, U, case.weights, state)
    found, _ = fk.explain_step(S, params, pair, U, case.weights, state, rows=f)
    torch.testing.assert_close(found.contributions, ours.contributions - ours.contributions.flip(0), rtol=1e-8,
                               atol=1e-13)  # fmt: skip


def test_a_path_that_there_is_not_is_said(case):
    with pytest.raises(fk.BatchError, match=r"path is 'middle'; expected 'midpoint' \(the default\), 'start' or"):
        nodes_of("middle", case.engine(fk)[1], None)


def test_the_start_knows_no_second_order(case):
    S, params, E, U = case.engine(fk)
    start, _ = fk.explain_step(S, params, E, U, case.weights, case.state(fk), path="start", rows=S)
    with pytest.raises(fk.BatchError, match='path="start" is the first order alone'):
        start.second_order  # noqa: B018 - raises
    torch.testing.assert_close(start.first_order, start.batch + start.momentum + start.decay)
    middle, _ = fk.explain_step(S, params, E, U, case.weights, case.state(fk), rows=S)
    assert middle.second_order.equal(middle.predicted)
