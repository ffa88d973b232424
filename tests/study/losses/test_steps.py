"""A step on a loss, really taken by torch, is predicted from the plan."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import fkernel as fk
from fkernel import checkpoint
from fkernel.study import (
    load_workspace,
)
from tests.study.losses.common import CASES, QUIET, RATIO, at_start, error, executed, surrogate, token_logp


@pytest.mark.turns(6)
@pytest.mark.parametrize("case", CASES)
def test_a_step_on_the_loss_is_predicted(second, tmp_path, case):
    loss, plan = CASES[case]
    after = second.step(case.replace("old", "ratio").replace(" ", "-"), loss(second))
    whole = second.plan(tmp_path / "out", after, plan(second), **QUIET)
    results, start = executed(whole), executed(at_start(whole))
    assert results.step["loss"]["clipped"] > 0.1
    assert results.step["clip"] < 1
    without = executed(second.plan(tmp_path / "out", after, None, update=second.foreign(), **QUIET))
    for name in ("held_out", "self"):
        first = error(start[name])
        assert first < 0.03
        assert error(results[name]) < min(0.005, first)
        assert error(without[name]) > 3 * first
        assert error(without[name]) > 0.05


@pytest.mark.parametrize("path", ["midpoint", "start"])
def test_what_each_sequence_did_is_its_share_of_the_loss(second, study, tmp_path, path):
    """C_eu = −c ⟨∇S_e(θ + sΔθ), P ∇L_u(θ)⟩, by plain autograd; Δθ is what the optimizer did."""
    plan, results = study
    model = checkpoint.load(second.one).model
    own = {**plan, "analyses": {}, "out": str(tmp_path), "storage": QUIET["storage"]}
    loss, found = surrogate(second), (results if path == "midpoint" else executed(at_start(own)))["self"]
    moved = [leaf.detach() for leaf in checkpoint.load(plan["step"]["after"]["path"]).model.parameters()]
    U = second.first.batch.sequences
    with load_workspace(f"{plan['out']}/workspace") as workspace:
        P, c = workspace.P, workspace.clip
    names = [name for name, _ in model.named_parameters()]

    def gradient(value):
        return dict(zip(names, torch.autograd.grad(value, [*model.parameters()]), strict=True))

    there = copy.deepcopy(model)
    with torch.no_grad():
        for leaf, after in zip(there.parameters(), moved, strict=True):
            leaf += {"start": 0.0, "midpoint": 0.5}[path] * (after - leaf)
    S = (token_logp(there, U) * U.response_mask[:, 1:]).sum(1)
    e = dict(zip(names, torch.autograd.grad(S[4], [*there.parameters()]), strict=True))
    worst = 0.0
    for u in range(len(second.first.batch)):
        expected = -c * float(fk.tree.dot(e, P(gradient(loss(model, slice(u, u + 1))))))
        atol = 1e-4 * float(np.abs(found.contributions).max())
        assert found.contributions[4, u] == pytest.approx(expected, rel=1e-3, abs=atol)
        worst = max(worst, abs(found.contributions[4, u] - expected))
    if path == "midpoint":  # it is the path that is met, and not the checkpoint nearby
        assert np.abs(found.contributions[4] - executed(at_start(own))["self"].contributions[4]).max() > 5 * worst


def test_old_log_probabilities_are_the_records_or_the_checkpoints(second, tmp_path):
    losses = RATIO, {**RATIO, "old": second.reference}
    one, other = (executed(second.plan(tmp_path, None, loss, **QUIET))["held_out"] for loss in losses)
    np.testing.assert_allclose(one.contributions, other.contributions, rtol=1e-3, atol=1e-7)


def test_the_first_step_from_a_batch_is_the_policy_gradient(second, tmp_path):
    """Ratios are 1, and nothing is clipped; a sequence without advantage has no column."""
    changes = {**QUIET, "checkpoint": second.reference}
    plain, ratio = (executed(second.plan(tmp_path, second.first.after, loss, **changes)) for loss in (None, RATIO))
    assert ratio.step["loss"]["ratio"] == {"min": 1, "mean": 1, "max": 1}
    assert ratio.step["loss"]["clipped"] == 0
    for name in ("held_out", "self"):
        for field in ("contributions", "batch", "momentum", "decay", "realised"):
            a, b = (getattr(results[name], field) for results in (plain, ratio))
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(a).max())
