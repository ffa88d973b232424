"""A loss is a weighted sum of token log-probabilities: against plain autograd, TRL's own losses, and real steps."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

import fkernel as fk
from fkernel import func, precond
from fkernel.func.losses import (
    Weighted,
    clipped_ratio_weights,
    clipped_sequence_ratio_weights,
    corrected_kl_penalty_weights,
    kl_penalty_weights,
    policy_gradient_weights,
    preference_weights,
    weighted_logprob,
)
from fkernel.rollout import loss_weights
from tests import oracle
from tests.cases import EXAMPLES
from tests.checkpoint.writers import TOKENIZER, qwen2
from tests.models import VOCABULARY
from tests.rollout.test_weights import LONGEST, PROMPTS, RESPONSES, padded, trainer  # noqa: F401 - a fixture

LOW, HIGH, BETA = 0.1, 0.3, 0.4
SHIFTS = (0.5, -0.4, 0.03, -0.1)
"""Mean log ratios: the first sequence has become likelier, the second less likely."""


def moved_apart(rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """Log-probabilities of another policy: ratios of every sequence on both sides of the clipping range."""
    return [row - shift - torch.linspace(-0.7, 0.7, len(row)).to(row) for row, shift in zip(rows, SHIFTS, strict=False)]


def laid(rows: list[torch.Tensor], batch: func.Sequences, elsewhere: float = float("nan")) -> torch.Tensor:
    """Values of response tokens where `token_logprobs` has them; elsewhere what must not be looked at."""
    out = torch.full(batch.input_ids.shape, elsewhere, dtype=rows[0].dtype)
    out[batch.response_mask.bool()] = torch.cat(rows)
    return out


def relative_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    gap = sum(float((found[name] - expected[name]).square().sum()) for name in expected)
    return (gap / sum(float(leaf.square().sum()) for leaf in expected.values())) ** 0.5


@pytest.fixture(params=EXAMPLES, ids=lambda case: case.model_name)
def case(request):
    return request.param


def engine(case) -> tuple[Any, ...]:
    """S and f, θ, E, U and its ω."""
    S, params, E, U = case.engine(fk)
    apply, _ = func.make_functional(case.model)
    omega = torch.randn(U.input_ids.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return S, weighted_logprob(apply, case.temperature), params, E, U, omega


def ones(batch: func.Sequences) -> torch.Tensor:
    return torch.ones(len(batch.input_ids), dtype=torch.float64)


# The losses as their papers write them, of one sequence: ℓ with its graph, the other policy's, w·A.


def clipped_ratio(l, other, a):
    r = (l - other).exp()
    return -torch.min(r * a, r.clamp(1 - LOW, 1 + HIGH) * a).sum()


def clipped_sequence_ratio(l, other, a):
    s = (l - other).mean().exp()
    return -len(l) * torch.min(s * a, s.clamp(1 - LOW, 1 + HIGH) * a)


def kl_penalty(l, other, a):
    return BETA * a * ((other - l).exp() - (other - l) - 1).sum()


def corrected_kl_penalty(l, other, a):
    d = 0.7 * l.detach() - l
    return BETA * a * ((l - other).exp() * (d.exp() - d - 1)).sum()


LOSSES = {
    "clipped ratio": (clipped_ratio, partial(clipped_ratio_weights, low=LOW, high=HIGH)),
    "clipped sequence ratio": (clipped_sequence_ratio, partial(clipped_sequence_ratio_weights, low=LOW, high=HIGH)),
    "KL penalty": (kl_penalty, partial(kl_penalty_weights, beta=BETA)),
    "corrected KL penalty": (
        corrected_kl_penalty,
        lambda l, other, a, mask: corrected_kl_penalty_weights(l, other, 0.7 * l, a, mask, BETA),
    ),
    "policy gradient": (lambda l, other, a: -a * l.sum(), lambda l, other, a, mask: policy_gradient_weights(a, mask)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_pullback_of_ones_is_minus_the_losses_gradient(case, name):
    loss, weights_of = LOSSES[name]
    _, f, params, _, U, _ = engine(case)
    a = torch.tensor([0.3, -0.5, -0.2], dtype=torch.float64)
    a = a.abs() if "penalty" in name else a
    rows = [oracle.log_distributions(case.model, u, case.temperature)[range(len(u[1])), u[1]] for u in case.U]
    others = moved_apart([row.detach() for row in rows])
    total = torch.stack([loss(*each) for each in zip(rows, others, a, strict=True)]).sum()
    named = dict(case.model.named_parameters())
    grads = torch.autograd.grad(total, [*named.values()], allow_unused=True)
    expected = {n: torch.zeros_like(p) if g is None else -g for (n, p), g in zip(named.items(), grads, strict=True)}

    omega = weights_of(laid([row.detach() for row in rows], U), laid(others, U), a, U.response_mask)
    assert not omega[~U.response_mask].any()
    zeros = [bool((omega[i] == 0)[U.response_mask[i]].any()) for i in range(len(a))]
    assert any(zeros) == name.startswith("clipped")
    assert loss is not clipped_ratio or all(zeros)  # of advantages of both signs
    pulled = func.vjp(f, case.microbatch)(params, Weighted(U, omega), ones(U))
    assert relative_error(pulled, expected) < 1e-10


def test_at_ratio_one_the_clipped_ratio_is_the_policy_gradient(case):
    _, _, params, _, U, _ = engine(case)
    l, a = func.token_logprobs(func.make_functional(case.model)[0])(params, U), case.weights
    omega = policy_gradient_weights(a, U.response_mask)
    assert torch.equal(clipped_ratio_weights(l, l, a, U.response_mask, 0.0, 0.0), omega)
    assert torch.equal(clipped_sequence_ratio_weights(l, l, a, U.response_mask, 0.0, 0.0), omega)
    assert not kl_penalty_weights(l, l, a.abs(), U.response_mask, beta=1.0).any()
    assert not corrected_kl_penalty_weights(l, 0.7 * l, l, a.abs(), U.response_mask, beta=1.0).any()


def test_equal_weights_make_it_log_pi(case):
    S, f, params, E, U, _ = engine(case)
    assert torch.equal(f(params, Weighted(E, E.response_mask)), S(params, E))
    batch = Weighted(U, policy_gradient_weights(case.weights, U.response_mask))
    torch.testing.assert_close(f(params, batch), case.weights * S(params, U), rtol=1e-12, atol=0)
    J = func.per_sequence_grad(S)(params, U)
    scaled = {name: torch.einsum("n,n...->n...", case.weights, leaf) for name, leaf in J.items()}
    assert relative_error(func.per_sequence_grad(f)(params, batch), scaled) < 1e-12


def test_every_derivative_agrees_with_every_other(case):
    _, f, params, _, U, omega = engine(case)
    batch, v, h = Weighted(U, omega), case.tree(31), 1e-5
    J = func.per_sequence_grad(f, case.microbatch)(params, batch)
    summed = {name: leaf.sum(0) for name, leaf in J.items()}
    assert relative_error(func.vjp(f, case.microbatch)(params, batch, ones(U)), summed) < 1e-10
    handles = func.per_sequence_handles(f)(params, batch)
    assert any(not isinstance(handle, torch.Tensor) for handle in handles.values())
    torch.testing.assert_close(func.contract(handles, handles), func.contract(J, J), rtol=1e-10, atol=1e-10)
    moved = lambda s: {name: leaf + s * h * v[name] for name, leaf in params.items()}  # noqa: E731
    slope = (f(moved(1), batch) - f(moved(-1), batch)) / (2 * h)
    torch.testing.assert_close(func.jvp(f, case.microbatch)(params, batch, v), slope, rtol=1e-6, atol=1e-8)
    along = func.contract(J, {name: leaf[None] for name, leaf in v.items()})[:, 0]
    torch.testing.assert_close(along, slope, rtol=1e-6, atol=1e-8)


def test_padding_and_microbatches_change_nothing(case):
    _, f, params, _, U, omega = engine(case)
    wide = Weighted(
        func.Sequences(*(torch.nn.functional.pad(leaf, (0, 2)) for leaf in U)),
        torch.nn.functional.pad(omega, (0, 2), value=9.0),  # on no response's token
    )
    torch.testing.assert_close(f(params, wide), f(params, Weighted(U, omega)), rtol=1e-12, atol=1e-12)
    J, K = func.per_sequence_grad(f)(params, Weighted(U, omega)), func.per_sequence_grad(f, 1)(params, wide)
    assert relative_error(K, J) < 1e-10


def test_weights_have_no_derivative(case):
    _, f, params, _, U, omega = engine(case)
    traced = omega.requires_grad_()
    value = f({name: leaf.requires_grad_() for name, leaf in params.items()}, Weighted(U, traced)).sum()
    assert torch.autograd.grad(value, traced, allow_unused=True)[0] is None


def test_a_losss_columns_and_log_pis_rows_meet_in_one_kernel(case):
    S, f, params, E, U, omega = engine(case)
    P = precond.diagonal({name: leaf.abs() for name, leaf in case.tree(32).items()})
    K = fk.kernel(f, params, Weighted(E, E.response_mask), Weighted(U, omega), P, microbatch=2)
    J_E, J_U = func.per_sequence_grad(S)(params, E), func.per_sequence_grad(f)(params, Weighted(U, omega))
    torch.testing.assert_close(K, func.contract(J_E, P(J_U)), rtol=1e-10, atol=1e-10)


def test_parts_of_a_loss_add_up(case):
    _, f, params, E, U, omega = engine(case)
    l = func.token_logprobs(func.make_functional(case.model)[0])(params, U)
    penalty = kl_penalty_weights(l, 0.7 * l, case.weights.abs(), U.response_mask, BETA)
    rows, P = Weighted(E, E.response_mask), precond.identity()
    whole, *parts = (fk.kernel(f, params, rows, Weighted(U, w), P) for w in (omega + penalty, omega, penalty))
    torch.testing.assert_close(whole, parts[0] + parts[1], rtol=1e-10, atol=1e-10)


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
        return torch.cat(preference_weights(self.margins(self.S(self.params, self.both)), BETA))


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
        for path, found in (("start", errors), ("midpoint", halfway)):
            given = (pairs.S, pairs.params, pairs.both, pairs.both, pairs.weights(), state)
            effect, _ = fk.explain_step(*given, path=path)  # pyright: ignore
            predicted = effect.kernel @ pairs.weights()
            found.append(float((realised - predicted).norm() / predicted.norm()))
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


# TRL's losses, which it computes in float32.


def offline(seed: int = 0) -> tuple[Any, Any]:
    model = qwen2(seed)
    model.set_attn_implementation("eager")
    return func.make_functional(model.eval())


def gradient_of(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """−∇L as a trainer's backward pass leaves it."""
    model.zero_grad()
    loss.backward()
    return {name: -p.grad.clone() for name, p in model.named_parameters()}


def completions(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


@pytest.mark.parametrize("rule", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize(
    ("level", "penalty"),
    [("token", "none"), ("token", "k3"), ("token", "corrected"), ("sequence", "none"), ("sequence", "k3")],
)
def test_trls_second_inner_epoch(trainer, level, rule, penalty):  # noqa: F811
    apply, params = offline()
    U, A = func.pad(PROMPTS, RESPONSES), torch.tensor([0.7, -1.2, 0.4, -0.1])
    l = func.token_logprobs(apply)(params, U)
    rows = [row[mask] for row, mask in zip(l, U.response_mask, strict=True)]
    old, reference = moved_apart(rows), [row + 0.3 * torch.cos(torch.arange(len(row))) for row in rows]
    (prompt_ids, prompt_mask), (completion_ids, completion_mask) = padded(PROMPTS, True), padded(RESPONSES, False)
    trainer.loss_type, trainer.importance_sampling_level, trainer.beta = rule, level, BETA * (penalty != "none")
    trainer.args.use_bias_correction_kl = penalty == "corrected"
    trainer.epsilon_low, trainer.epsilon_high = LOW, HIGH
    trainer.current_gradient_accumulation_steps, trainer.args.steps_per_generation = 2, 4
    inputs = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": A,
        "num_items_in_batch": torch.tensor(40),  # of the generation batch, which has more than these four
        "old_per_token_logps": completions(old),
        "ref_per_token_logps": completions(reference),
    }
    theirs = gradient_of(trainer.model, trainer._compute_loss(trainer.model.train(), inputs))

    options: dict[str, Any] = {"accumulation": 2, "tokens": 40, "steps_per_generation": 4}
    w = loss_weights([*map(len, RESPONSES)], rule, max_completion_length=LONGEST, **options).float()
    weights_of = clipped_ratio_weights if level == "token" else clipped_sequence_ratio_weights
    omega = weights_of(l, laid(old, U), w * A, U.response_mask, LOW, HIGH)
    clipped = U.response_mask & (omega == 0)
    for some in (clipped, U.response_mask & (omega != 0)):
        assert some[A > 0].any()
        assert some[A < 0].any()
    if penalty == "k3":
        omega = omega + kl_penalty_weights(l, laid(reference, U), w, U.response_mask, BETA)
    if penalty == "corrected":
        given = (l, laid(old, U), laid(reference, U), w, U.response_mask)
        omega = omega + corrected_kl_penalty_weights(*given, beta=BETA)
    ours = func.vjp(weighted_logprob(apply))(params, Weighted(U, omega), torch.ones(len(A)))
    assert relative_error(ours, theirs) < 1e-5


def test_trls_dpo(tmp_path):
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

    options: dict[str, Any] = {"bf16": False, "gradient_checkpointing": False, "use_cpu": True, "report_to": []}
    trained: Any = qwen2(0)
    dpo = DPOTrainer(
        model=trained,
        ref_model=qwen2(1),
        args=DPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=2, beta=BETA, **options),
        train_dataset=Dataset.from_list([{"prompt": "1+1=", "chosen": "2", "rejected": "3"}] * 2),
        processing_class=TOKENIZER,
    )
    chosen, rejected = RESPONSES, RESPONSES[::-1]
    pairs = [
        {"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in zip(PROMPTS, chosen, rejected, strict=True)
    ]
    loss: Any = dpo.compute_loss(trained.train(), DataCollatorForPreference(pad_token_id=0)(pairs))
    theirs = gradient_of(trained, loss)

    (apply, params), (_, reference) = offline(0), offline(1)
    S, both = func.sequence_logprob(apply), func.pad(PROMPTS * 2, chosen + rejected)
    of_chosen, of_rejected = (S(params, both) - S(reference, both)).chunk(2)
    margins = BETA * (of_chosen - of_rejected)
    torch.testing.assert_close(-logsigmoid(margins).mean(), loss.detach(), rtol=1e-5, atol=0)
    ours = func.vjp(S)(params, both, torch.cat(preference_weights(margins, BETA)))
    assert relative_error(ours, theirs) < 1e-5


# What is wrong is said.

L, MASK, W = torch.zeros(2, 3), torch.tensor([[0, 1, 1], [0, 1, 0]]), torch.ones(2)
NAN = torch.tensor([[0.0, 0.0, 0.0], [0.0, torch.nan, 0.0]])


@pytest.mark.parametrize(
    ("kind", "call", "message"),
    [
        (
            fk.BatchError,
            lambda: policy_gradient_weights(W, MASK[0]),
            r"response_mask has shape \[3\]; expected \[n t\]",
        ),
        (fk.BatchError, lambda: policy_gradient_weights(W[:1], MASK), r"weights has shape \[1\]; the batch holds 2"),
        (fk.NonFiniteError, lambda: policy_gradient_weights(W / 0, MASK), r"weights\[0\] is inf"),
        (fk.BatchError, lambda: clipped_ratio_weights(L[:, 1:], L, W, MASK), r"^logprobs has shape \[2, 2\], and"),
        (fk.BatchError, lambda: clipped_ratio_weights(L, L[:1], W, MASK), r"old_logprobs has shape \[1, 3\], and"),
        (fk.NonFiniteError, lambda: clipped_ratio_weights(NAN, L, W, MASK), r"^logprobs of sequence 1 is not finite"),
        (fk.NonFiniteError, lambda: clipped_ratio_weights(L, NAN, W, MASK), r"old_logprobs of sequence 1 is not"),
        (fk.NonFiniteError, lambda: clipped_ratio_weights(L, L - 1e3, -W, MASK), r"exp\(logprobs − old_logprobs\) of"),
        (fk.ModelError, lambda: clipped_ratio_weights(L, L, W, MASK, low=-0.1), r"low is -0.1; expected a number in"),
        (fk.ModelError, lambda: clipped_ratio_weights(L, L, W, MASK, low=1.1), r"low is 1.1; expected a number in"),
        (fk.ModelError, lambda: clipped_ratio_weights(L, L, W, MASK, high=-0.1), r"high is -0.1; expected a number ≥"),
        (fk.ModelError, lambda: clipped_sequence_ratio_weights(L, L, W, MASK, high=torch.nan), r"high is nan"),
        (fk.ModelError, lambda: kl_penalty_weights(L, L, W, MASK, 0.0), r"beta is 0.0; expected a positive number"),
        (fk.BatchError, lambda: kl_penalty_weights(L, L, -W, MASK, 0.1), r"weights\[0\] is -1.0; a penalty has no adv"),
        (fk.BatchError, lambda: kl_penalty_weights(L, L[0], W, MASK, 0.1), r"reference_logprobs has shape \[3\]"),
        (fk.NonFiniteError, lambda: kl_penalty_weights(L - 1e3, L, W, MASK, 0.1), r"exp\(reference_logprobs − logpr"),
        (fk.BatchError, lambda: corrected_kl_penalty_weights(L, L, L, -W, MASK, 0.1), r"give loss weights w, and not"),
        (fk.NonFiniteError, lambda: corrected_kl_penalty_weights(L, L - 1e3, L + 1, W, MASK, 0.1), r"exp\(logprobs − "),
        (fk.ModelError, lambda: preference_weights(W, -0.1), r"beta is -0.1; expected a positive number"),
        (fk.BatchError, lambda: preference_weights(L, 0.1), r"margins has shape \[2, 3\]; expected \[n\]"),
        (fk.BatchError, lambda: preference_weights(W[:0], 0.1), r"margins has shape \[0\]; expected \[n\]"),
        (fk.NonFiniteError, lambda: preference_weights(NAN[1], 0.1), r"margins of pair 1 is not finite"),
    ],
)
def test_numbers_that_make_no_weights_are_refused(kind, call, message):
    with pytest.raises(kind, match=message):
        call()


def test_a_batch_without_its_weights_is_refused():
    _, f, params, _, U, omega = engine(EXAMPLES[1])
    with pytest.raises(fk.BatchError, match=r"given Sequences; expected Weighted\(sequences, token_weights\)"):
        func.vjp(f)(params, U, torch.ones(3))
    with pytest.raises(fk.BatchError, match=r"token_weights has shape \[3, 2\] for sequences of \[3, 9\]"):
        f(params, Weighted(U, omega[:, :2]))
    with pytest.raises(fk.NonFiniteError, match="token_weights of sequence 1 is not finite"):
        f(params, Weighted(U, torch.where(torch.arange(3)[:, None] == 1, torch.inf, omega)))
    with pytest.raises(fk.BatchError, match=r"token id .* vocabulary"):
        f(params, Weighted(U._replace(input_ids=U.input_ids + 99), omega))
    with pytest.raises(fk.ModelError, match=r"temperature is 0.0"):
        weighted_logprob(lambda params, ids, mask: ids, 0.0)
