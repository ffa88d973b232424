"""What a loss cannot be asked for is said."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pydantic
import pytest
import torch

import fkernel as fk
from fkernel.study import (
    FisherKernelPlan,
    check_inputs,
)
from tests.study.losses.common import QUIET, RATIO, executed, kl, surrogate


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"requests": [{"kind": "update", "advantages": {"U-000-01": -1.0}}]},
            "advantage of U-000-01 is 0.015873, and",
        ),
        ({"requests": [{"kind": "update", "advantages": {"U-002-00": 1.0}}]}, "advantage of U-002-00 is 0, and"),
        ({"analyses": {"counterfactuals": [{"name": "a", "flip": ["U-001-*"]}]}}, "changes its sign"),
        ({"analyses": {"counterfactuals": [{"name": "a", "scale": {"U-000-00": -2.0}}]}}, "changes its sign"),
        ({"analyses": {"counterfactuals": [{"name": "a", "advantages": "raw"}]}}, "changes its sign"),
    ],
)
def test_advantages_that_change_their_signs_are_refused(second, tmp_path, changes, message):
    after = second.step("ratio", surrogate(second))
    with pytest.raises(fk.PlanError, match=message):
        executed(second.plan(tmp_path, after, RATIO, **{**QUIET, **changes}))


def test_only_u_may_be_of_another_policy(second, tmp_path):
    request = {"kind": "from_file", "path": str(second.first.update)}
    with pytest.raises(fk.RolloutError, match="another policy's"):
        executed(second.plan(tmp_path, None, RATIO, requests=[request], **QUIET))
    spec = {"kind": "policy_gradient", "kl": kl(second)}
    for loss in (None, spec):
        with pytest.raises(fk.RolloutError, match="another policy's"):
            executed(second.plan(tmp_path, None, loss, **QUIET))
        update = {"kind": "payload", "batch": second.first.batch}
        with pytest.raises(fk.PlanError, match="another policy's"):
            executed(second.plan(tmp_path, None, loss, update=update, **QUIET))


def test_old_is_the_policy_that_sampled(second, tmp_path):
    loss = {**RATIO, "old": {"path": str(second.one)}}
    with pytest.raises(fk.PlanError, match=r"step.loss.old is the checkpoint .* and U was written by"):
        executed(second.plan(tmp_path, None, loss, **QUIET))
    unknown = {"kind": "payload", "batch": replace(second.first.batch, checkpoint=None)}
    with pytest.raises(fk.RolloutError, match="Was it sampled from another checkpoint"):
        executed(second.plan(tmp_path, None, loss, update=unknown, **QUIET))
    known = [executed(second.plan(tmp_path, None, RATIO, **QUIET, **given)) for given in ({}, {"update": unknown})]
    np.testing.assert_array_equal(known[0]["held_out"].batch, known[1]["held_out"].batch)


@pytest.mark.turns(6)
@pytest.mark.filterwarnings("ignore:The sequences were sampled at temperature")
def test_records_are_no_log_probabilities_of_another_temperature(second, tmp_path):
    changes = {**QUIET, "numerics": {"temperature": 0.7}}
    with pytest.raises(fk.PlanError, match=r"at temperature 0.7, and U's records have them at 1; give step.loss.old"):
        executed(second.plan(tmp_path, None, RATIO, **changes))
    loss = {**RATIO, "old": second.reference}
    cold = executed(second.plan(tmp_path, None, loss, **changes))
    warm = executed(second.plan(tmp_path, None, loss, **QUIET))
    assert cold.step["loss"]["ratio"]["max"] > warm.step["loss"]["ratio"]["max"]


def test_loss_weights_below_zero_are_said(second, tmp_path):
    weights = torch.tensor([record.weight for record in second.first.batch])
    weights[3] *= -1
    update = {"kind": "payload", "batch": second.first.batch.with_values("weight", weights)}
    with pytest.raises(fk.RolloutError, match="these have w < 0: 'U-001-00'"):
        executed(second.plan(tmp_path, None, RATIO, update=update, **QUIET))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"kind": "ppo"}, "clipped_ratio"),
        ({"kind": "policy_gradient"}, "say what is beside it"),
        ({"kind": "cispo"}, "Field required"),
        ({"kind": "vespo", "positive": [1]}, "Field required|too_short|at least 2"),
        ({"kind": "clipped_ratio", "low": 1.5}, "less than or equal to 1"),
        ({"kind": "clipped_ratio", "epsilon": 0.2}, "Extra inputs"),
        ({"kind": "preference", "beta": 0.0, "reference": {"path": "x"}}, "greater than 0"),
        ({"kind": "preference", "beta": 0.1}, "Field required"),
    ],
)
def test_mistakes_in_a_plan_are_said(second, tmp_path, loss, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        FisherKernelPlan.model_validate(second.plan(tmp_path, None, loss))


def test_a_draw_has_no_old_policy(second, tmp_path):
    draw = {"kind": "update", "batch_size_prompts": 2, "completions_per_prompt": 2, "reward": None}
    with pytest.raises(pydantic.ValidationError, match=r"step.loss.old sampled U, and .* draws another U"):
        FisherKernelPlan.model_validate(second.plan(tmp_path, None, {**RATIO, "old": second.reference}, update=draw))


def test_missing_policies_are_said_with_their_place(second, tmp_path):
    gone = {"path": "nowhere"}
    loss = {**RATIO, "old": gone, "kl": {"beta": 0.1, "reference": gone}}
    with pytest.raises(fk.PlanError) as caught:
        check_inputs(FisherKernelPlan.model_validate(second.plan(tmp_path, None, loss)))
    assert str(caught.value).splitlines() == [
        f"step.loss.{place}.path: there is nothing at nowhere; expected a file or a directory."
        for place in ("old", "kl.reference")
    ]
