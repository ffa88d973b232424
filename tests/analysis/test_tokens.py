"""A sequence taken apart: tokens add up to it, in the first order and in the kernel."""

from __future__ import annotations

import pytest
import torch

import fkernel as fk
from fkernel import func, precond, tree
from fkernel.analysis import apart, token_change, token_kernel
from tests.cases import EXAMPLES


@pytest.fixture(params=EXAMPLES, ids=lambda case: case.model_name)
def case(request):
    return request.param


def one(batch, i):
    return func.Sequences(*(leaf[i : i + 1] for leaf in batch))


def test_tokens_add_up_to_their_sequence(case):
    S, params, E, _ = case.engine(fk)
    apply, _ = func.make_functional(case.model)
    step = case.tree(41, 1e-3)
    found = token_change(apply, params, E, step, case.temperature)
    torch.testing.assert_close(found.logprob.sum(1), func.jvp(S)(params, E, step), rtol=1e-10, atol=1e-14)
    assert (found.logprob[~E.response_mask.bool()] == 0).all()
    assert (found.entropy[~E.response_mask.bool()] == 0).all()


def test_token_changes_are_differences(case):
    _, params, E, _ = case.engine(fk)
    apply, _ = func.make_functional(case.model)
    v, h = case.tree(42), 1e-5
    found = token_change(apply, params, E, v, case.temperature)
    for f, change in (
        (func.token_logprobs(apply, case.temperature), found.logprob),
        (func.token_entropy(apply, case.temperature), found.entropy),
    ):
        ahead, back = (f(tree.axpy(s * h, v, params), E) for s in (1, -1))
        torch.testing.assert_close(change, (ahead - back) / (2 * h), rtol=1e-6, atol=1e-8)


def test_the_tokens_kernel_adds_up_to_the_sequences(case):
    S, params, E, U = case.engine(fk)
    P = precond.diagonal({name: leaf.abs() + 0.1 for name, leaf in case.tree(43).items()})
    K = fk.kernel(S, params, E, U, P)
    tokens = token_kernel(S, params, one(E, 0), one(U, 1), P)
    assert tokens.shape == (len(case.E[0][1]), len(case.U[1][1]))
    torch.testing.assert_close(tokens.sum(), K[0, 1], rtol=1e-10, atol=0.0)


def test_an_entry_is_the_kernel_of_two_tokens(case):
    S, params, E, U = case.engine(fk)
    apply, _ = func.make_functional(case.model)
    e, u = one(E, 0), one(U, 0)
    P = precond.identity()
    found = token_kernel(S, params, e, u, P)
    t = e.response_mask[0].nonzero()[-1, 0]
    logprobs = func.token_logprobs(apply, case.temperature)
    last = func.per_sequence_grad(
        lambda params, batch: func.token_logprobs(apply, case.temperature)(params, batch)[:, t]
    )
    mine = last(params, e)
    s = u.response_mask[0].nonzero()[0, 0]
    first = torch.func.grad(lambda params: logprobs(params, u)[0, s])(params)
    expected = sum((mine[name][0] * first[name]).sum() for name in params)
    torch.testing.assert_close(found[-1, 0], expected, rtol=1e-10, atol=1e-14)


def test_more_than_one_sequence_is_said(case):
    _, _, _, U = case.engine(fk)
    with pytest.raises(fk.BatchError, match="Tokens are of one sequence; this batch has 3"):
        apart(U)
