"""Steps that were not taken: the recomputed one is what torch does, the frozen one is linear in the weights."""

from __future__ import annotations

import copy

import pytest
import torch

import fkernel as fk
from fkernel import func, precond, tree
from fkernel.analysis import alternative_step, counterfactual
from tests import oracle
from tests.cases import EXAMPLES


@pytest.fixture(params=EXAMPLES, ids=lambda case: case.model_name)
def case(request):
    return request.param


def taken(case, max_norm: float | None = 0.05, lr=1e-4):
    """(S, params, E, J_U as handles, g of the step that was taken, state)."""
    S, params, E, U = case.engine(fk)
    g, _, _ = fk.loss_gradient(S, params, U, case.weights, max_norm=max_norm)
    return S, params, E, func.per_sequence_handles(S)(params, U), g, case.state(fk, lr=lr)


def really(case, weights, state, max_norm, lr):
    """What `torch.optim.AdamW` makes of other weights: θ after it."""
    model = copy.deepcopy(case.model)
    named = dict(model.named_parameters())
    one = next(iter(named))
    optimizer = torch.optim.AdamW(
        named.values(), lr=lr * state.lr[one], betas=(state.beta1[one], state.beta2[one]), eps=state.eps[one],
        weight_decay=state.weight_decay[one],
    )  # fmt: skip
    for name, p in named.items():
        moments = {"exp_avg": state.exp_avg[name].clone(), "exp_avg_sq": state.exp_avg_sq[name].clone()}
        optimizer.state[p] = {"step": torch.tensor(float(state.step[name])), **moments}
    scores = torch.stack([oracle.logprob(model, pair, case.temperature) for pair in case.U])
    (-(weights * scores).sum()).backward()
    if max_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    return {name: p.detach() for name, p in named.items()}


@pytest.mark.parametrize("change", ["flip", "drop", "weigh", "clip", "rate"])
def test_the_recomputed_step_is_the_one_that_torch_takes(case, change):
    S, params, E, J, g, state = taken(case)
    w, max_norm, lr = case.weights.clone(), 0.05, 1.0
    match change:
        case "flip":
            w[0] = -w[0]
        case "drop":
            w[-1] = 0
        case "weigh":
            w *= torch.linspace(0.5, 2, len(w), dtype=torch.float64)
        case "clip":
            max_norm = None
        case "rate":
            lr = 3.0
    other = alternative_step(params, func.weighted_sum(J, w), state, g, max_norm=max_norm, lr=lr)
    after = really(case, w, state, max_norm, lr)
    for name, leaf in tree.add(params, other.exact.total).items():
        torch.testing.assert_close(leaf, after[name], rtol=1e-10, atol=1e-14)
    found = counterfactual(S, params, E, other)
    realised = fk.realised_change(S, params, after, E)
    error = (found.second_order - realised).norm() / realised.norm()
    assert error < 1e-3
    assert error < (found.exact - realised).norm() / realised.norm()


def test_the_frozen_one_is_linear_and_meets_the_step_that_was_taken(case):
    S, params, E, J, g, state = taken(case, max_norm=None)
    along = lambda w: counterfactual(  # noqa: E731
        S, params, E, alternative_step(params, func.weighted_sum(J, w), state, g)
    )
    w = case.weights
    effect, _ = fk.explain_step(S, params, E, case.batch(fk, case.U), w, state, path="start")
    now = along(w)
    for form in (now.frozen, now.exact):
        torch.testing.assert_close(form, effect.predicted, rtol=1e-9, atol=1e-14)
    for u in range(len(w)):
        left = w.clone()
        left[u] = 0
        gone = now.frozen - along(left).frozen
        torch.testing.assert_close(gone, effect.contributions[:, u], rtol=1e-8, atol=1e-14)
    assert (along(-w).exact - along(-w).frozen).abs().max() == pytest.approx(0, abs=1e-12)  # g² is the same
    assert (along(3 * w).exact - along(3 * w).frozen).abs().max() > 1e-9


def test_clipping_is_of_the_other_gradient(case):
    _, params, _, J, g, state = taken(case)
    ascent = func.weighted_sum(J, 2 * case.weights)
    other = alternative_step(params, ascent, state, g, max_norm=0.05)
    assert other.clip == pytest.approx(0.05 / (float(tree.norm(ascent)) + 1e-6))
    assert alternative_step(params, ascent, state, g, clip=0.3).clip == 0.3


def test_a_rate_is_not_negative(case):
    _, params, _, _, g, state = taken(case)
    with pytest.raises(fk.OptimizerStateError, match=r"lr is -1\.0; expected"):
        alternative_step(params, g, state, g, lr=-1.0)


def test_the_other_rate_leaves_the_state_as_it_was(case):
    _, params, _, _, g, state = taken(case)
    before = dict(state.lr)
    alternative_step(params, g, state, g, lr=2.0)
    assert state.lr == before
    assert precond.gradient_rates(state)
