"""Named losses of a plan against steps that torch really took on them, as their papers write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fkernel import checkpoint
from tests.study.losses.common import HIGH, LOW, QUIET, Second, error, executed, token_logp

BONUS = 0.3


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
    "supervised": (supervised, {"kind": "cross_entropy"}),
}


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
