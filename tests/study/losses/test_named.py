"""Named losses of a plan against steps that torch really took on them, as their papers write them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fkernel import checkpoint
from tests.study.losses.common import HIGH, LOW, QUIET, Second, error, executed, token_logp

BONUS = 0.3
DELTA, SHARE = 1.2, 0.4
AWAY, CAP = 0.05, 1.1


def ratios(second: Second) -> tuple[Any, ...]:
    """U, its mask, A and w, and a function from a model to (log π, log of its ratio to the policy that sampled)."""
    batch = second.first.batch
    U, mask = batch.sequences, batch.sequences.response_mask[:, 1:].bool()
    A, w = batch.advantages[:, None], torch.tensor([record.weight for record in batch])[:, None]
    with torch.no_grad():
        old = token_logp(checkpoint.load(second.first.before).model, U)

    def of(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        now = token_logp(model, U)
        return now, torch.where(mask, now - old, 0.0)

    return U, mask, A, w, of


def cispo(second: Second) -> Callable[[Any], torch.Tensor]:
    _, mask, A, w, of = ratios(second)

    def loss(model: Any) -> torch.Tensor:
        now, log_r = of(model)
        return -(w * mask * log_r.exp().clamp(max=1 + HIGH).detach() * A * now).sum()

    return loss


def sapo(second: Second) -> Callable[[Any], torch.Tensor]:
    _, mask, A, w, of = ratios(second)
    τ = torch.where(A > 0, 1.0, 1.05)

    def loss(model: Any) -> torch.Tensor:
        _, log_r = of(model)
        return -(w * mask * torch.sigmoid(τ * (log_r.exp() - 1)) * 4 / τ * A).sum()

    return loss


def clipped_with_bonus(second: Second) -> Callable[[Any], torch.Tensor]:
    U, mask, A, w, of = ratios(second)

    def loss(model: Any) -> torch.Tensor:
        _, log_r = of(model)
        r = log_r.exp()
        each = -torch.min(r * A, r.clamp(1 - LOW, 1 + HIGH) * A)
        log_p = model(U.input_ids).logits[:, :-1].log_softmax(-1)
        return (w * mask * (each - BONUS * -(log_p.exp() * log_p).sum(-1))).sum()

    return loss


def turned(second: Second) -> dict[str, Any]:
    """U with every advantage's sign turned: the responses of A < 0 are those that have become likelier."""
    batch = second.first.batch
    signs = zip(batch, batch.advantages.tolist(), strict=True)
    records = tuple(replace(record, advantage=-A) for record, A in signs)
    return {"kind": "payload", "batch": replace(batch, records=records)}


def upper_clipped(second: Second) -> Callable[[Any], torch.Tensor]:
    """−Σ w min(min(r, δ) A, clip(r) A), as INTELLECT-2 writes it."""
    _, mask, A, w, of = ratios(second)

    def loss(model: Any) -> torch.Tensor:
        r = of(model)[1].exp()
        assert (mask & (A > 0) & (r > DELTA)).any()  # the bound is met
        return -(w * mask * torch.min(r.clamp(max=DELTA) * -A, r.clamp(1 - LOW, 1 + HIGH) * -A)).sum()

    return loss


def of_highest_entropy(second: Second) -> Callable[[Any], torch.Tensor]:
    U, mask, A, w, of = ratios(second)

    def loss(model: Any) -> torch.Tensor:
        r = of(model)[1].exp()
        with torch.no_grad():
            log_p = model(U.input_ids).logits[:, :-1].log_softmax(-1)
        H = -(log_p.exp() * log_p).sum(-1)
        least = H[mask].quantile(1 - SHARE)
        kept = mask & (least <= H)
        return -(w * kept * torch.min(r * A, r.clamp(1 - LOW, 1 + HIGH) * A)).sum()

    return loss


def sampled_elsewhere(second: Second) -> dict[str, Any]:
    """U as if the policy after the first step had sampled it, with an engine of other log-probabilities."""
    batch = second.foreign()["batch"]
    generator = torch.Generator().manual_seed(5)
    records = []
    for record in batch:
        by = 0.4 * torch.randn(1, generator=generator) + 0.1 * torch.randn(len(record.logqs), generator=generator)
        records.append(replace(record, logqs=tuple((torch.tensor(record.logqs) + by).tolist())))
    return {"kind": "payload", "batch": replace(batch, records=tuple(records))}


def logprobs_of_sampler(second: Second) -> torch.Tensor:
    """[n t−1], of the tokens that follow."""
    batch = sampled_elsewhere(second)["batch"]
    laid = torch.zeros(batch.sequences.input_ids.shape)
    laid[batch.sequences.response_mask.bool()] = torch.tensor([q for record in batch for q in record.logqs])
    return laid[:, 1:]


def near_the_sampler(second: Second) -> Callable[[Any], torch.Tensor]:
    """The policy gradient without sequences of A < 0 whose sampler is more than a threshold away."""
    _, mask, A, w, of = ratios(second)
    sampler = logprobs_of_sampler(second)

    def loss(model: Any) -> torch.Tensor:
        now = of(model)[0]
        away = ((sampler - now.detach()) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        assert 0 < ((A < 0) & (away > AWAY)).sum() < (A < 0).sum()  # it leaves some out, and not all
        return -(w * mask * ((A >= 0) | (away <= AWAY)) * A * now).sum()

    return loss


def corrected(second: Second) -> Callable[[Any], torch.Tensor]:
    """The policy gradient times min(π/π_sampler, C) of each token."""
    _, mask, A, w, of = ratios(second)
    sampler = logprobs_of_sampler(second)

    def loss(model: Any) -> torch.Tensor:
        now = of(model)[0]
        return -(w * mask * (now.detach() - sampler).exp().clamp(max=CAP) * A * now).sum()

    return loss


def supervised(second: Second) -> Callable[[Any], torch.Tensor]:
    _, mask, _, w, of = ratios(second)
    return lambda model: -(w * mask * of(model)[0]).sum()


CASES: dict[str, tuple[Callable[[Second], Any], dict[str, Any]]] = {
    "cispo": (cispo, {"kind": "cispo", "cap": 1 + HIGH}),
    "sapo": (sapo, {"kind": "sapo"}),
    "bonus": (
        clipped_with_bonus,
        {"kind": "clipped_ratio", "low": LOW, "high": HIGH, "entropy": {"coefficient": BONUS}},
    ),
    "top_entropy": (of_highest_entropy, {"kind": "clipped_ratio", "low": LOW, "high": HIGH, "top_entropy": SHARE}),
    "supervised": (supervised, {"kind": "cross_entropy"}),
}


@pytest.mark.turns(6)
@pytest.mark.parametrize("case", CASES)
def test_a_step_on_a_named_loss_is_predicted(second, tmp_path, case):
    loss, plan = CASES[case]
    after = second.step(case, loss(second))
    found = executed(second.plan(tmp_path / "out", after, plan, **QUIET))
    other = executed(second.plan(tmp_path / "out", after, {"kind": "clipped_ratio", "low": 0.9, "high": 9.0}, **QUIET))
    assert found.step["audit"]["fine"], found.step["audit"]["verdict"]
    assert other.step["audit"]["fine"] == (case == "sapo")  # whose gate does about what a wide range does
    for name in ("held_out", "self"):
        assert error(found[name]) < 0.005
        assert error(other[name]) > 4 * error(found[name])
    if case == "bonus":
        parts = found["held_out"].parts
        assert np.linalg.norm(parts["entropy"]) > 0.02 * np.linalg.norm(parts["advantage"])


CLIPPED: dict[str, Any] = {"kind": "clipped_ratio", "low": LOW, "high": HIGH}
CHANGED: dict[str, tuple[Callable[[Second], Any], Any, Any, dict[str, Any]]] = {
    "delta": (upper_clipped, turned, CLIPPED, {"delta": DELTA}),
    "off_policy_mask": (near_the_sampler, sampled_elsewhere, None, {"off_policy_mask": AWAY}),
    "correction": (
        corrected, sampled_elsewhere, None, {"correction": {"mode": "truncate", "level": "token", "high": CAP}},
    ),
}  # fmt: skip
"""{setting: (the loss, U, the loss without the setting, the setting)}."""


@pytest.mark.parametrize("case", CHANGED)
def test_a_setting_of_a_loss_is_needed_and_is_enough(second, tmp_path, case):
    loss, batch, without, setting = CHANGED[case]
    after = second.step(case, loss(second))
    given: dict[str, Any] = {**QUIET, "update": batch(second)}
    found = executed(second.plan(tmp_path / "out", after, (without or {"kind": "policy_gradient"}) | setting, **given))
    plain = executed(second.plan(tmp_path / "out", after, without, **given))
    assert found.step["audit"]["fine"], found.step["audit"]["verdict"]
    for name in ("held_out", "self"):
        assert error(found[name]) < 0.005
        assert error(plain[name]) > 4 * error(found[name])


@pytest.mark.turns(6)
def test_another_clipping_range_is_a_counterfactual(second, tmp_path):
    """It is the step that would have been taken, which a plan with that range predicts as well."""
    loss, plan = CASES["bonus"]
    after = second.step("bonus", loss(second))
    wide = {"name": "wide", "clip_range": [0.4, 0.6]}
    asked = {"counterfactuals": [wide, {"name": "none", "parts": {"entropy": 0}}]}
    found = executed(second.plan(tmp_path / "out", after, plan, analyses=asked, **QUIET))["held_out"]
    for name, changes in (("wide", {"low": 0.4, "high": 0.6}), ("none", {"entropy": None})):
        other = second.plan(tmp_path / "out", None, {**plan, **changes}, **QUIET)
        other["step"]["path"] = "start"
        expected = executed(other)["held_out"].predicted
        made = found.analysis(f"counterfactuals.{name}")
        np.testing.assert_allclose(made["exact"], expected, rtol=1e-3, atol=1e-7)
        assert np.linalg.norm(made["exact"] - made["taken"]) > 1e-3 * np.linalg.norm(made["taken"])
