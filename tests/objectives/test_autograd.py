"""Laws of losses: ω and η are the gradient that autograd finds of the loss as it is written."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given

from fkernel.func.objectives import (
    LossInputs,
    LossTerm,
    cispo,
    clipped_ratio,
    corrected_kl_penalty,
    cross_entropy,
    dppo,
    entropy_bonus,
    from_autograd,
    high_entropy_mask,
    ipo,
    kl_penalty,
    luspo,
    masked_importance,
    off_policy_mask,
    policy_gradient,
    preference,
    sapo,
    scale_advantages,
    total,
    truncated_importance,
    vespo,
)
from tests.objectives import written
from tests.objectives.common import apart, drawn, gap, random_inputs

EXACT = 1e-10
CLIP: dict[str, Any] = {"low": 0.15, "high": 0.25}
DRIFT: dict[str, Any] = {"low": 0.02, "high": 0.05, "kl": 0.03}
GAMMA: dict[str, tuple[float, float]] = {"positive": (1.5, 2.0), "negative": (2.5, 0.7)}
LEVELS = ("token", "sequence")

Ours = Callable[..., dict[str, LossTerm]]
LOSSES: dict[str, tuple[Callable[..., torch.Tensor], Ours]] = {
    "policy gradient": (written.policy_gradient, policy_gradient),
    "cross entropy": (written.cross_entropy, cross_entropy),
    "KL": (partial(written.kl, beta=0.3), partial(kl_penalty, beta=0.3)),
    "entropy bonus": (partial(written.entropy_bonus, coefficient=0.02), partial(entropy_bonus, coefficient=0.02)),
    "VESPO": (partial(written.vespo, **GAMMA, corrected=False), partial(vespo, **GAMMA)),
    "DPPO with KL": (partial(written.drift, **DRIFT, both=False), partial(dppo, **DRIFT)),
    "IPO with KL": (partial(written.drift, **{**DRIFT, "low": 0.05}, both=True), partial(ipo, threshold=0.05, kl=0.03)),
    "LUSPO": (partial(written.clipped, **CLIP, delta=None, level="sequence"), partial(luspo, **CLIP)),
}
for level in LEVELS:
    for delta in (None, 1.4, 1.1, 0.9):  # the last two are below 1 + high, which nobody means and TRL lets through
        options = {**CLIP, "delta": delta, "level": level}
        LOSSES[f"clipped, {level}, {delta}"] = (partial(written.clipped, **options), partial(clipped_ratio, **options))
    for name, theirs, ours, options in (
        ("CISPO", written.cispo, cispo, {"cap": 1.2}),
        ("SAPO", written.sapo, sapo, {"positive": 1.3, "negative": 0.6}),
        ("corrected KL", written.corrected_kl, corrected_kl_penalty, {"beta": 0.3}),
    ):
        LOSSES[f"{name}, {level}"] = (partial(theirs, **options, level=level), partial(ours, **options, level=level))
OF_ADVANTAGES = [name for name in LOSSES if not any(word in name for word in ("KL", "entropy", "VESPO"))]
OF_RATIOS = [name for name in OF_ADVANTAGES if "0.9" not in name]  # such a delta clips a ratio of 1 too


def asked(loss: Callable[..., torch.Tensor], inputs: LossInputs, factor: torch.Tensor | None = None) -> LossTerm:
    """Plain autograd at ℓ and H of every row."""
    assert inputs.entropies is not None
    l, H = (leaf.clone().requires_grad_() for leaf in (inputs.logprobs, inputs.entropies))
    value = torch.stack([loss(row) for row in written.rows(inputs, l, H, factor)]).sum()
    return LossTerm(*torch.autograd.grad(value, (l, H), allow_unused=True, materialize_grads=True))


def outside(term: LossTerm, inputs: LossInputs) -> torch.Tensor:
    return torch.stack([leaf[~inputs.response_mask.bool()] for leaf in term if leaf is not None])


@pytest.mark.parametrize("name", LOSSES)
@given(inputs=drawn)
def test_omega_and_eta_are_autograds(name, inputs):
    loss, ours = LOSSES[name]
    term = total(ours(inputs))
    assert apart(term, asked(loss, inputs)) < EXACT
    assert not outside(term, inputs).any()


@pytest.mark.parametrize("name", OF_ADVANTAGES)
@given(inputs=drawn)
def test_factors_multiply_the_loss_of_every_token(name, inputs):
    """With a sequence's ratio a token's factor reaches all tokens of its sequence."""
    loss, ours = LOSSES[name]
    factors = (truncated_importance(inputs, "token"), high_entropy_mask(inputs, 0.6), off_policy_mask(inputs, 0.05))
    product = factors[0] * factors[1] * factors[2]
    assert apart(total(ours(scale_advantages(inputs, *factors))), asked(loss, inputs, product)) < EXACT


@given(inputs=drawn)
def test_vespo_multiplies_the_correction_into_the_sequences_ratio(inputs):
    for correction in (truncated_importance(inputs, "token", 0.5, 1.5), masked_importance(inputs, "token", 0.8, 1.4)):
        expected = asked(partial(written.vespo, **GAMMA, corrected=True), inputs, correction)
        assert apart(total(vespo(inputs, **GAMMA, correction=correction)), expected) < EXACT


@given(inputs=drawn)
def test_an_entropy_bonus_of_some_tokens(inputs):
    some = high_entropy_mask(inputs, 0.3)
    expected = asked(partial(written.entropy_bonus, coefficient=0.02), inputs, some)
    assert apart(total(entropy_bonus(inputs, 0.02, some)), expected) < EXACT


@given(inputs=drawn)
def test_preferences_are_autograds(inputs):
    n = len(inputs.logprobs)
    pairs = torch.tensor([[0, 1], *([i, i - 1] for i in range(2, n)), [n - 1, 0]])  # most rows are in two of them
    weights = torch.linspace(0.1, 1.0, len(pairs), dtype=torch.float64)
    assert inputs.reference is not None
    l, mask = inputs.logprobs.clone().requires_grad_(), inputs.response_mask.bool()
    S = torch.stack([(row - ref)[kept].sum() for row, ref, kept in zip(l, inputs.reference, mask, strict=True)])
    each = torch.stack([-torch.log(1 / (1 + torch.exp(-0.7 * (S[c] - S[r])))) for c, r in pairs.tolist()])
    for given_weights, value in ((None, each.mean()), (weights, (weights * each).sum())):
        (expected,) = torch.autograd.grad(value, l, retain_graph=True)
        term = total(preference(inputs, pairs, 0.7, given_weights))
        assert gap(term.omega, expected) < EXACT
        assert not outside(term, inputs).any()


@pytest.mark.parametrize("name", OF_RATIOS)
@given(inputs=drawn)
def test_at_ratio_one_every_loss_is_the_policy_gradient(name, inputs):
    """With a sequence's ratio too, where its tokens have one advantage and one weight."""
    A, w = torch.randn(2, len(inputs.logprobs), dtype=torch.float64)
    one = inputs._replace(old=inputs.logprobs, advantages=A, weights=w.abs())
    assert apart(total(LOSSES[name][1](one)), total(policy_gradient(one))) < 1e-14


@given(inputs=drawn)
def test_vespo_at_ratio_one_and_penalties_at_the_reference(inputs):
    one = inputs._replace(old=inputs.logprobs, reference=inputs.logprobs)
    assert apart(total(vespo(one)), total(policy_gradient(one))) < 1e-14
    assert not kl_penalty(one, 0.1)["kl"].omega.any()
    assert not corrected_kl_penalty(one, 0.1)["kl"].omega.any()
    assert not corrected_kl_penalty(one, 0.1, "sequence")["kl"].omega.any()


@given(inputs=drawn)
def test_importance_is_the_policys_over_the_samplers(inputs):
    mask = inputs.response_mask.bool()
    for i, kept in enumerate(mask):
        log_ratio = (inputs.old - inputs.sampler)[i][kept]
        log_ratio[log_ratio.isnan()] = 0.0
        for level, rho in (("token", log_ratio.exp()), ("sequence", log_ratio.sum().exp().expand(len(log_ratio)))):
            truncated = truncated_importance(inputs, level, 0.8, 1.3)
            masked = masked_importance(inputs, level, 0.8, 1.3)
            open_ended = truncated_importance(inputs, level, high=torch.inf)
            torch.testing.assert_close(truncated[i][kept], rho.clamp(0.8, 1.3), rtol=1e-12, atol=0)
            torch.testing.assert_close(open_ended[i][kept], rho, rtol=1e-12, atol=0)
            torch.testing.assert_close(masked[i][kept], rho * (rho >= 0.8) * (rho <= 1.3), rtol=1e-12, atol=0)
    assert not truncated_importance(inputs)[~mask].any()


@given(inputs=drawn)
def test_masks_of_tokens_and_of_sequences(inputs):
    mask = inputs.response_mask.bool()
    assert inputs.entropies is not None
    kept = high_entropy_mask(inputs, 0.4)
    values = inputs.entropies[mask]
    assert torch.equal(kept[mask].bool(), values >= torch.quantile(values, 0.6))
    assert high_entropy_mask(inputs, 0.0).sum() == 1
    assert torch.equal(high_entropy_mask(inputs, 1.0).bool(), mask)
    for given_inputs, other in ((inputs, inputs.sampler), (inputs._replace(sampler=None), inputs.old)):
        on_policy = off_policy_mask(given_inputs, 0.1)
        for i, response in enumerate(mask):
            apart_by = (other - inputs.logprobs)[i][response].nan_to_num(nan=0.0).mean()
            A = inputs.advantages[i] if inputs.advantages.ndim == 1 else inputs.advantages[i][response]
            expected = ((A >= 0) | (apart_by <= 0.1)).expand(int(response.sum()))
            assert torch.equal(on_policy[i][response].bool(), expected)
        assert not on_policy[~mask].any()


@given(inputs=drawn)
def test_parts_add_up_and_autograd_is_there_for_any_loss(inputs):
    def whole(l: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
        each = written.rows(inputs, l, H)
        return torch.stack(
            [
                written.clipped(r, **CLIP, delta=None, level="token")
                + written.kl(r, 0.2)
                + written.entropy_bonus(r, 0.01)
                for r in each
            ]
        ).sum()

    parts = {**clipped_ratio(inputs, **CLIP), **kl_penalty(inputs, 0.2), **entropy_bonus(inputs, 0.01)}
    assert [*parts] == ["advantage", "kl", "entropy"]
    found = from_autograd(whole, inputs.logprobs, inputs.entropies)
    assert apart(total(parts), found) < EXACT
    assert not outside(found, inputs).any()


def test_autograd_without_entropies_and_inside_of_no_grad():
    l = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    with torch.no_grad():
        term = from_autograd(lambda l: (l.exp() * l).sum(), l)
    torch.testing.assert_close(term.omega, (l.exp() * (1 + l)).detach())
    assert term.eta is None
    assert not term.omega.requires_grad
    assert l.grad is None
    unused = from_autograd(lambda l, H: l.sum(), l, torch.ones(1, 2))
    assert unused.eta is not None
    assert not unused.eta.any()


def test_nothing_carries_a_graph_and_dtypes_are_the_logprobs():
    inputs = random_inputs(1)
    assert isinstance(inputs, LossInputs)
    floats: dict[str, Any] = {
        name: leaf.float() if name == "logprobs" else leaf
        for name, leaf in inputs._asdict().items()
        if leaf is not None
    }
    traced = LossInputs(**floats)._replace(logprobs=inputs.logprobs.float().requires_grad_())
    for ours in (clipped_ratio, sapo, vespo, partial(kl_penalty, beta=0.1), partial(entropy_bonus, coefficient=0.1)):
        for leaf in total(ours(traced)):
            assert leaf is None or (leaf.dtype == torch.float32 and not leaf.requires_grad)


def test_a_row_without_response_counts_nothing():
    """TRL's mask_truncated_completions leaves such rows."""
    inputs = random_inputs(2)
    mask = inputs.response_mask.clone()
    mask[1] = 0
    for name, (_, ours) in LOSSES.items():
        term = total(ours(inputs._replace(response_mask=mask)))
        assert term.omega.isfinite().all(), name
        assert not term.omega[1].any(), name
    none = inputs._replace(response_mask=torch.zeros_like(mask))
    assert not high_entropy_mask(none, 0.5).any()
