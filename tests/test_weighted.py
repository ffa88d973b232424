"""A loss's columns: weighted sums of token log-probabilities and entropies, and what real steps on them do."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

import fkernel as fk
from fkernel import func, precond
from fkernel.func import Weighted, objectives, weighted_logprob
from fkernel.func.objectives import LossInputs
from tests import oracle
from tests.cases import EXAMPLES
from tests.models import MODELS, VOCABULARY

BETA = 0.4


def relative_error(given: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    gap = sum(float((given[name] - expected[name]).square().sum()) for name in expected)
    return (gap / sum(float(leaf.square().sum()) for leaf in expected.values())) ** 0.5


@pytest.fixture(params=EXAMPLES, ids=lambda case: case.model_name)
def case(request):
    return request.param


def engine(case) -> tuple[Any, ...]:
    """S and f, θ, E, and U with ω and η."""
    S, params, E, U = case.engine(fk)
    apply, _ = func.make_functional(case.model)
    g = torch.Generator().manual_seed(4)
    omega, eta = torch.randn(2, *U.input_ids.shape, generator=g, dtype=torch.float64)
    return S, weighted_logprob(apply, case.temperature), params, E, Weighted(U, omega, eta)


def ones(batch: func.Sequences) -> torch.Tensor:
    return torch.ones(len(batch.input_ids), dtype=torch.float64)


def test_the_pullback_of_ones_is_the_gradient_of_a_loss_with_entropies(case):
    _, f, params, _, batch = engine(case)
    named = dict(case.model.named_parameters())
    total = torch.zeros((), dtype=torch.float64)
    for row, (prompt, response) in enumerate(case.U):
        log_p = oracle.log_distributions(case.model, (prompt, response), case.temperature)
        place = slice(len(prompt), len(prompt) + len(response))
        total = total + (batch.token_weights[row, place] * log_p[range(len(response)), response]).sum()
        total = total - (batch.entropy_weights[row, place] * (log_p.exp() * log_p).sum(1)).sum()
    grads = torch.autograd.grad(total, [*named.values()], allow_unused=True)
    expected = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), grads, strict=True)}
    pulled = func.vjp(f, case.microbatch)(params, batch, ones(batch.sequences))
    assert relative_error(pulled, expected) < 1e-10
    bare = func.vjp(f, case.microbatch)(params, batch._replace(entropy_weights=None), ones(batch.sequences))
    assert relative_error(bare, expected) > 1e-3


def test_equal_weights_make_it_log_pi(case):
    S, f, params, E, (U, *_) = engine(case)
    assert torch.equal(f(params, Weighted(E, E.response_mask)), S(params, E))
    assert torch.equal(f(params, (E, E.response_mask, None)), S(params, E))  # pyright: ignore - a plain tuple
    inputs = LossInputs(torch.zeros(U.input_ids.shape).double(), U.response_mask, -case.weights, ones(U))
    batch = Weighted(U, objectives.policy_gradient(inputs)["advantage"].omega)
    torch.testing.assert_close(f(params, batch), case.weights * S(params, U), rtol=1e-12, atol=0)
    J = func.per_sequence_grad(S)(params, U)
    scaled = {name: torch.einsum("n,n...->n...", case.weights, leaf) for name, leaf in J.items()}
    assert relative_error(func.per_sequence_grad(f)(params, batch), scaled) < 1e-12


def test_every_derivative_agrees_with_every_other(case):
    _, f, params, _, batch = engine(case)
    v, h = case.tree(31), 1e-5
    J = func.per_sequence_grad(f, case.microbatch)(params, batch)
    summed = {name: leaf.sum(0) for name, leaf in J.items()}
    assert relative_error(func.vjp(f, case.microbatch)(params, batch, ones(batch.sequences)), summed) < 1e-10
    handles = func.per_sequence_handles(f)(params, batch)
    assert any(not isinstance(handle, torch.Tensor) for handle in handles.values())
    torch.testing.assert_close(func.contract(handles, handles), func.contract(J, J), rtol=1e-10, atol=1e-10)
    moved = lambda s: {name: leaf + s * h * v[name] for name, leaf in params.items()}  # noqa: E731
    slope = (f(moved(1), batch) - f(moved(-1), batch)) / (2 * h)
    torch.testing.assert_close(func.jvp(f, case.microbatch)(params, batch, v), slope, rtol=1e-6, atol=1e-8)
    along = func.contract(J, {name: leaf[None] for name, leaf in v.items()})[:, 0]
    torch.testing.assert_close(along, slope, rtol=1e-6, atol=1e-8)


def test_padding_and_microbatches_change_nothing(case):
    _, f, params, _, batch = engine(case)
    U, *weights = batch
    wide = Weighted(
        func.Sequences(*(torch.nn.functional.pad(leaf, (0, 2)) for leaf in U)),
        *(torch.nn.functional.pad(leaf, (0, 2), value=9.0) for leaf in weights),  # on no response's token
    )
    torch.testing.assert_close(f(params, wide), f(params, batch), rtol=1e-12, atol=1e-12)
    J, K = func.per_sequence_grad(f)(params, batch), func.per_sequence_grad(f, 1)(params, wide)
    assert relative_error(K, J) < 1e-10


def test_weights_have_no_derivative(case):
    _, f, params, _, (U, *weights) = engine(case)
    traced = [leaf.requires_grad_() for leaf in weights]
    value = f({name: leaf.requires_grad_() for name, leaf in params.items()}, Weighted(U, *traced)).sum()
    assert torch.autograd.grad(value, traced, allow_unused=True) == (None, None)


def test_a_losss_columns_and_log_pis_rows_meet_in_one_kernel(case):
    S, f, params, E, batch = engine(case)
    P = precond.diagonal({name: leaf.abs() for name, leaf in case.tree(32).items()})
    K = fk.kernel(f, params, Weighted(E, E.response_mask), batch, P, microbatch=2)
    J_E, J_U = func.per_sequence_grad(S)(params, E), func.per_sequence_grad(f)(params, batch)
    torch.testing.assert_close(K, func.contract(J_E, P(J_U)), rtol=1e-10, atol=1e-10)


def test_parts_of_a_loss_add_up(case):
    _, f, params, E, (U, omega, eta) = engine(case)
    assert eta is not None
    l = func.token_logprobs(func.make_functional(case.model)[0])(params, U)
    inputs = LossInputs(l, U.response_mask, weights=case.weights.abs(), reference=0.7 * l)
    terms = {
        "advantage": objectives.LossTerm(omega),
        **objectives.kl_penalty(inputs, BETA),
        **objectives.entropy_bonus(inputs, 0.1),
    }
    rows, P = Weighted(E, E.response_mask), precond.identity()
    whole, *parts = (
        fk.kernel(f, params, rows, Weighted(U, *term), P) for term in (objectives.total(terms), *terms.values())
    )
    torch.testing.assert_close(whole, torch.stack(parts).sum(0), rtol=1e-10, atol=1e-10)


# Steps of DPO.


class Pairs:
    """Chosen responses, as many rejected ones, and a reference's S of both."""

    def __init__(self, case, chosen: list[oracle.Pair], rejected: list[oracle.Pair]):
        self.model, self.temperature, self.pairs = case.model, case.temperature, chosen + rejected
        self.S, self.params, _, _ = case.engine(fk)
        self.both = case.batch(fk, self.pairs)
        self.reference = oracle.logprobs(oracle.moved(case.model, case.tree(33), 0.05), self.pairs, case.temperature)

    @classmethod
    def of(cls, case) -> Pairs:
        others = [(prompt, [(token + 1) % VOCABULARY for token in reversed(response)]) for prompt, response in case.U]
        return cls(case, case.U, others)

    def margins(self, scores):
        chosen, rejected = (scores - self.reference).chunk(2)
        return BETA * (chosen - rejected)

    def step(self, optimizer: Callable[[Any], Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What the optimizer's step on DPO's loss changed, [2n] nats, and the gradient that it was given."""
        model = copy.deepcopy(self.model)
        scores = torch.stack([oracle.logprob(model, pair, self.temperature) for pair in self.pairs])
        (-logsigmoid(self.margins(scores)).mean()).backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer(model).step()
        return oracle.logprobs(model, self.pairs, self.temperature) - scores.detach(), grads

    def weights(self) -> torch.Tensor:
        l = func.token_logprobs(func.make_functional(self.model)[0], self.temperature)(self.params, self.both)
        mask, n = self.both.response_mask, len(self.pairs) // 2
        share = self.reference[:, None] / mask.sum(1, keepdim=True)  # S of the reference, dealt out to its tokens
        inputs = LossInputs(l, mask, reference=torch.where(mask, share, 0.0))
        rows = torch.stack([torch.arange(n), torch.arange(n) + n], 1)
        omega = objectives.preference(inputs, rows, BETA)["preference"].omega
        return -omega.sum(1) / mask.sum(1)


def sgd(model: Any, lr: float) -> Any:
    return torch.optim.SGD(model.parameters(), lr=lr)


def adamw(model: Any, state: precond.AdamWState, lr: float) -> Any:
    """AdamW with a past."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    for name, p in model.named_parameters():
        moments = {"exp_avg": state.exp_avg[name].clone(), "exp_avg_sq": state.exp_avg_sq[name].clone()}
        optimizer.state[p] = {"step": torch.tensor(float(state.step[name])), **moments}
    return optimizer


def shrinks_as_lr(errors: list[float]) -> bool:
    """Relative errors of ten times smaller steps: first-order predictions err by lr, relatively."""
    return all(8 < before / after < 12.5 for before, after in pairwise(errors))


def test_an_sgd_step_of_dpo_is_the_kernel_times_the_weights(case):
    pairs, errors = Pairs.of(case), []
    K = fk.kernel(pairs.S, pairs.params, pairs.both, pairs.both, precond.identity())
    for lr in (1e-3, 1e-4, 1e-5):
        realised, grads = pairs.step(partial(sgd, lr=lr))
        predicted = lr * K @ pairs.weights()
        errors.append(float((realised - predicted).norm() / predicted.norm()))
    assert errors[-1] < 1e-3
    assert shrinks_as_lr(errors), errors
    pulled = func.vjp(pairs.S)(pairs.params, pairs.both, pairs.weights())
    assert relative_error(pulled, {name: -g for name, g in grads.items()}) < 1e-10


def test_an_adamw_step_of_dpo_is_the_steps_kernel_times_the_weights(case):
    pairs, errors, halfway = Pairs.of(case), [], []
    for lr in (1e-2, 1e-3, 1e-4):
        state = case.state(fk, lr=lr, weight_decay=0.0)  # neither decay nor momentum: what the step does, the batch did
        state = dataclasses.replace(state, exp_avg={k: torch.zeros_like(m) for k, m in state.exp_avg.items()})
        realised, _ = pairs.step(partial(adamw, state=state, lr=lr))
        for path, kept in (("start", errors), ("midpoint", halfway)):
            given = (pairs.S, pairs.params, pairs.both, pairs.both, pairs.weights(), state)
            effect, _ = fk.explain_step(*given, path=path)  # pyright: ignore
            predicted = effect.kernel @ pairs.weights()
            kept.append(float((realised - predicted).norm() / predicted.norm()))
    assert errors[-1] < 1e-3
    assert shrinks_as_lr(errors), errors
    assert halfway[1] < 0.05 * halfway[0], halfway  # as lr²: a hundredth, but for the largest step


def test_a_chosen_response_falls_where_the_kernel_ties_it_to_the_rejected_one():
    """Likelihood displacement, of single pairs that differ in their last token."""
    case, fallen = EXAMPLES[0], []
    for last in range(VOCABULARY):
        pairs = Pairs(case, [([3, 5], [7, 2, last])], [([3, 5], [7, 2, (last + 1) % VOCABULARY])])
        K = fk.kernel(pairs.S, pairs.params, pairs.both, pairs.both, precond.identity())
        (chosen, rejected), _ = pairs.step(partial(sgd, lr=1e-6))
        assert chosen > rejected  # the margin rises
        assert bool(chosen < 0) == bool(K[0, 1] > K[0, 0])
        fallen.append(bool(chosen < 0))
    assert 0 < sum(fallen) < len(fallen)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (lambda U: U, "was given Sequences; expected Weighted"),
        (lambda U: Weighted(U, torch.ones(3, 1)), r"token_weights has shape \[3, 1\]"),
        (lambda U: Weighted(U, U.response_mask, torch.ones(3, 1)), r"entropy_weights has shape \[3, 1\]"),
        (lambda U: Weighted(U, U.response_mask / 0), "token_weights of sequence 0 is not finite"),
        (lambda U: Weighted(U, U.response_mask, U.response_mask / 0), "entropy_weights of sequence 0 is not finite"),
    ],
)
def test_a_batch_without_its_weights_is_refused(batch, message):
    case = EXAMPLES[0]
    _, f, params, _, (U, *_) = engine(case)
    with pytest.raises(fk.FKernelError, match=message):
        f(params, batch(U))


def test_sequences_without_weight_are_not_what_gradients_are_certified_on():
    """Their gradient is 0 whatever the model is: a certificate of them says nothing, and must not warn of it."""
    model = MODELS["own"](3)
    apply, params = func.make_functional(model)
    batch = func.pad([[1, 2], [3, 4], [5, 6, 7]], [[1], [2, 3], [4, 5, 6]])
    ω = torch.ones(batch.input_ids.shape) * batch.response_mask
    ω[:2] = 0.0  # the two shortest, which would be certified
    f = func.weighted_logprob(apply)
    with warnings.catch_warnings(), func.made_certificates() as made:
        warnings.simplefilter("error")
        K = fk.kernel(f, params, func.Weighted(batch, ω), func.Weighted(batch, ω), precond.identity())
    assert float(K[0].norm()) == 0
    assert float(K[2, 2]) > 0
    rows = [each for each in made if each.name == "rows"]
    assert rows
    assert all(each.passed and "of 0" not in each.detail for each in rows)
