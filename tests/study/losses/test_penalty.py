"""A penalty has a term of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fkernel import checkpoint
from tests.study.losses.common import BETA, QUIET, at_start, error, executed, token_logp


def test_a_penalty_has_a_term_of_its_own(study):
    _, results = study
    found = results["held_out"]
    total = found.batch + found.momentum + found.decay
    np.testing.assert_allclose(found.predicted, total, rtol=1e-6)
    np.testing.assert_allclose(found.batch, found.parts["advantage"] + found.parts["kl"], rtol=1e-5, atol=1e-9)
    assert np.linalg.norm(found.parts["kl"]) > 0.1 * np.linalg.norm(found.realised)
    assert found.calibration["predicted"].relative_error < 0.005
    assert results.step["loss"]["kl"] > 0
    np.testing.assert_allclose(found.contributions.sum(1), found.parts["advantage"], rtol=1e-4, atol=1e-8)


def test_a_penalty_does_not_depend_on_a_requests_advantages(second, study, tmp_path):
    plan, results = study
    halves = dict(zip(second.first.batch.ids, (second.first.batch.advantages / 2).tolist(), strict=True))
    request = {"kind": "evaluation", "name": "held_out", "batch_size_prompts": 4, "advantages": halves}
    found = executed({**plan, "requests": [request], "analyses": {}, "out": str(tmp_path)} | QUIET)["held_out"]
    parts, first = found.parts, results["held_out"].parts
    np.testing.assert_allclose(parts["kl"], first["kl"], rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(parts["advantage"], first["advantage"] / 2, rtol=1e-4, atol=1e-9)


@pytest.mark.turns(6)
def test_the_policy_gradient_with_a_penalty(second, tmp_path):
    """A first step, with another reference: its penalty is not zero."""
    batch, U = second.first.batch, second.first.batch.sequences
    mask, w = U.response_mask[:, 1:].bool(), torch.tensor([record.weight for record in batch])[:, None]
    with torch.no_grad():
        reference, old = (token_logp(checkpoint.load(x).model, U) for x in (second.one, second.first.before))

    def loss(model: Any) -> torch.Tensor:
        now = token_logp(model, U)
        d = reference - now
        each = -batch.advantages[:, None] * now + BETA * (now - old).exp() * (d.exp() - d - 1)
        return (w * torch.where(mask, each, 0.0)).sum()

    after = second.step("first-kl", loss, second.first.before)
    spec = {"kind": "policy_gradient", "kl": {"beta": BETA, "reference": {"path": str(second.one)}}}
    changes = {**QUIET, "checkpoint": second.reference}
    whole = second.plan(tmp_path / "a", after, spec, **changes)
    results, start = executed(whole), executed(at_start(whole))
    without = executed(second.plan(tmp_path / "b", after, None, **changes))
    for name in ("held_out", "self"):
        first = error(start[name])
        assert first < 0.03
        assert error(results[name]) < min(0.005, first)
        assert error(without[name]) > 3 * first
    assert "clipped" not in results.step["loss"]
    request = {"kind": "update", "advantages": "rloo"}
    own = executed(second.plan(tmp_path / "c", after, spec, **changes, requests=[request]))
    assert "kl" in own["update"].parts  # signs may change: nothing here depends on them
