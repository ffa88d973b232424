"""The batch's effect by part: sequences raised and lowered, and reward functions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import fkernel as fk
from fkernel.rollout import GeneratedBatch, save_batch, split_advantages
from fkernel.study import FisherKernelPlan, FisherKernelRunner
from tests.study.conftest import MAX_NORM

QUIET: dict[str, Any] = {"storage": {"persist": False, "pictures": False}}


def short(prompt: Any, response: str) -> float:
    return 1.0 / (1 + len(response))


def odd(prompt: Any, response: str) -> float:
    return float(len(response.encode()) % 2)


def explained(plan: dict[str, Any], **step: Any) -> Any:
    return FisherKernelRunner({**plan, "step": {**plan["step"], **step}} | QUIET).run()


def test_raised_and_lowered_sequences_add_up_to_the_batch(run, tmp_path):
    analyses = {"ledger": True, "counterfactuals": [{"name": "raised", "parts": {"lowered": 0}}]}
    plan = run.plan(tmp_path, analyses=analyses)
    found, whole = explained(plan, parts="signs")["held_out"], explained(plan | {"analyses": {}})["held_out"]
    A = run.batch.advantages.numpy()
    C = whole.kept("contributions")
    np.testing.assert_array_equal(found.kept("contributions"), C)
    for part, columns in (("raised", A > 0), ("lowered", A < 0)):
        np.testing.assert_allclose(found.parts[part], C[:, columns].sum(1), rtol=1e-3, atol=1e-8)
    np.testing.assert_allclose(found.parts["raised"] + found.parts["lowered"], found.batch, rtol=1e-3, atol=1e-8)
    np.testing.assert_array_equal(found.batch, whole.batch)
    assert [*found.analysis("ledger").arrays][:2] == ["part.raised", "part.lowered"]
    raised = found.analysis("counterfactuals.raised")
    assert np.linalg.norm(raised["frozen"] - raised["taken"]) > 0


def rewarded(batch: GeneratedBatch, weights: dict[str, float]) -> GeneratedBatch:
    values = [{"short": short(None, r.response), "odd": odd(None, r.response)} for r in batch]
    records = tuple(
        replace(r, rewards=v, reward_weights=weights, reward=sum(weights[k] * v[k] for k in v))
        for r, v in zip(batch, values, strict=True)
    )
    return replace(batch, records=records).with_advantages("group_mean")


def test_reward_functions_have_their_parts(run, tmp_path):
    batch = rewarded(run.batch, {"short": 1.0, "odd": 0.3})
    save_batch(batch, tmp_path / "update")
    plan = run.plan(tmp_path / "out", update={"kind": "from_file", "path": str(tmp_path / "update")})
    plan["step"] = {"max_norm": MAX_NORM}
    found = explained(plan, parts="rewards", rule="group_mean")["held_out"]
    parts = split_advantages(batch, "group_mean")
    K, w = found.kept("kernel"), torch.tensor([record.weight for record in batch])
    clip = float(found.kept("contributions").sum() / (K * (w * batch.advantages).numpy()).sum())
    for name, A in parts.items():
        np.testing.assert_allclose(found.parts[name], clip * K @ (w * A).numpy(), rtol=1e-2, atol=1e-7)
    np.testing.assert_allclose(sum(found.parts.values()), found.batch, rtol=1e-3, atol=1e-7)
    with pytest.raises(fk.PlanError, match=r"give step\.rule"):
        explained(plan, parts="rewards")


def test_a_plan_draws_with_several_reward_functions(run, tmp_path):
    rewards = {"short": f"{__name__}.short", "odd": f"{__name__}.odd"}
    update = {"kind": "update", "batch_size_prompts": 3, "completions_per_prompt": 3, "reward": rewards}
    update |= {"reward_weights": {"short": 1.0, "odd": 0.3}}
    plan = run.plan(tmp_path, update=update)
    plan["step"] = {"max_norm": MAX_NORM}
    runner = FisherKernelRunner({**plan, "step": {**plan["step"], "parts": "rewards"}} | QUIET)
    found = runner.run()["held_out"]
    assert {*found.parts} == {"reward:short", "reward:odd"}
    assert runner.workspace is not None
    assert runner.workspace.batch.records[0].reward_weights == {"short": 1.0, "odd": 0.3}


def test_parts_of_a_loss_that_is_not_made_of_advantages_are_refused(run, tmp_path):
    plan = run.plan(tmp_path)
    with pytest.raises(ValueError, match=r"step\.parts splits advantages"):
        FisherKernelPlan.model_validate(plan | {"step": {"parts": "signs", "loss": {"kind": "token_weights"}}})
