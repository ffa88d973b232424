"""The expected reward is over a set: an answer that is given twice is one of it, at the probability that it has."""

from __future__ import annotations

import pytest
import torch

import fkernel as fk
from fkernel import func
from fkernel.func.observables import Answers, expected_reward, kl_divergence
from tests.cases import EXAMPLES


@pytest.fixture(params=EXAMPLES, ids=lambda case: case.model_name)
def case(request):
    return request.param


def answers(case):
    """Three different answers to as many prompts as there are, and what they are worth."""
    _, params, _, _ = case.engine(fk)
    apply, _ = func.make_functional(case.model)
    prompts = [[1, 2], [3], [2]]
    given = [[[1]] * 3, [[1, 2]] * 3, [[4, 1, 2], [2], [3, 3]]]
    return apply, params, [func.pad(prompts, each) for each in given], torch.tensor([[1.0, 0.2, -0.5]]).double()


def test_a_repeated_answer_counts_once(case):
    apply, params, (a, b, c), rewards = answers(case)
    f, v = expected_reward(apply, 0.8), case.tree(31)
    once = Answers((a, b, c), rewards.expand(3, 3))
    S = torch.stack([func.sequence_logprob(apply, 0.8)(params, each) for each in (a, b, c)], 1)
    expected = (S.softmax(1) * rewards).sum(1)
    wide = func.Sequences(*(torch.nn.functional.pad(leaf, (0, 3)) for leaf in b))  # padding makes no other answer of it
    twice = Answers((a, b, c, wide, a, wide), rewards[:, [0, 1, 2, 1, 0, 1]].expand(3, 6))
    for batch in (once, twice):
        torch.testing.assert_close(f(params, batch), expected)
        torch.testing.assert_close(func.jvp(f)(params, batch, v), func.jvp(f)(params, once, v))
        each = func.per_sequence_grad(f, microbatch=2)(params, batch)
        for name, leaf in func.per_sequence_grad(f)(params, once).items():
            torch.testing.assert_close(each[name], leaf)
    mixed = Answers((a, b, c, a), torch.tensor([[1.0, 0.2, -0.5, 3.0]]).double().expand(3, 4))
    torch.testing.assert_close(f(params, mixed), (S.softmax(1) * torch.tensor([[2.0, 0.2, -0.5]])).sum(1))


def test_what_belongs_to_the_prompt_makes_another_answer(case):
    apply, params, _, _ = answers(case)
    one, other = func.pad([[1]], [[2, 3]]), func.pad([[1, 2]], [[3]])  # the same tokens, of which more were asked
    given, rewards = (one, other, func.pad([[1]], [[3]])), torch.tensor([[1.0, 0.0, 0.0]]).double()
    S = torch.stack([func.sequence_logprob(apply)(params, each) for each in given], 1)
    torch.testing.assert_close(expected_reward(apply)(params, Answers(given, rewards)), S.softmax(1)[:, 0])


def test_kl_is_to_the_whole_reference_whichever_parameters_are_analysed(case):
    apply, params, (_, _, batch), _ = answers(case)
    reference = {name: leaf + 0.05 * case.tree(32)[name] for name, leaf in params.items()}
    whole = kl_divergence(apply, reference)(params, batch)
    few = [name for name in params if "norm" in name or "ln" in name] or [*params][:1]
    part, chosen = func.make_functional(case.model, few)
    torch.testing.assert_close(kl_divergence(part, reference)(chosen, batch), whole)
    torch.testing.assert_close(kl_divergence(part, reference, 1.0, apply)(chosen, batch), whole)
    along = {name: case.tree(33)[name] for name in few}
    rest = {name: along.get(name, torch.zeros_like(leaf)) for name, leaf in params.items()}
    slope = func.jvp(kl_divergence(part, reference))(chosen, batch, along)
    torch.testing.assert_close(slope, func.jvp(kl_divergence(apply, reference))(params, batch, rest))
