"""Nothing is loaded before it is needed, and whatever is given is taken instead of made."""

from __future__ import annotations

import numpy as np
import pytest

import fkernel as fk
from fkernel.study import FisherKernelPlan, FisherKernelRunner, load_workspace
from tests.study.test_workspace import asking


@pytest.mark.turns(6)
def test_the_generator_is_built_only_when_a_request_needs_it(run, tmp_path):
    plan = asking(run, tmp_path / "out")
    plan["requests"] = [{"kind": "update"}]
    runner = FisherKernelRunner(plan)
    assert not {"checkpoint", "generator", "policy"} & set(vars(runner))
    runner.run()
    assert "generator" in vars(runner)  # U was read by it
    draws = {**plan, "update": {"kind": "update", "batch_size_prompts": 3, "completions_per_prompt": 3,
                                "reward": "tests.study.conftest.brevity"}, "out": str(tmp_path / "drawn")}  # fmt: skip
    FisherKernelRunner(draws).run()
    again = FisherKernelRunner(draws)
    again.run()
    assert "generator" not in vars(again)  # U is in the workspace, and nothing else is to be drawn


def test_a_batch_that_is_given_is_taken(run, tmp_path):
    runner = FisherKernelRunner(asking(run, tmp_path / "out"))
    with pytest.raises(fk.PlanError, match="prepare_update_workspace"):
        runner.evaluate_batch(runner.plan.requests[0])
    with runner.prepare_update_workspace():
        request = runner.plan.requests[0]
        E = runner.generator.generate_evaluation_batch(3, seed=11)
        found = runner.evaluate_batch(request, batch=E, capture_full=True)
        assert [info.id for info in found.evaluation] == E.ids
        assert found.kernel is not None
        without = runner.evaluate_batch(request, batch=E, capture_full=False)
        assert without.kernel is None
        np.testing.assert_array_equal(without.batch, found.batch)
        few = request.model_copy(update={"sequence_ids": ("E-001-*",)})
        (only,) = runner.evaluate_batch(few, batch=E).evaluation
        assert only.id == "E-001-00"


@pytest.mark.turns(6)
def test_another_plan_begins_anew(run, tmp_path):
    runner = FisherKernelRunner(asking(run, tmp_path / "one"))
    with runner.prepare_update_workspace() as first:
        pass
    other = FisherKernelPlan.model_validate(asking(run, tmp_path / "two"))
    with runner.prepare_update_workspace(other) as second:
        assert second.directory != first.directory
        assert runner.plan is other
    assert runner.run(other).plan["out"] == str(tmp_path / "two")


def test_a_workspace_of_another_checkpoint_is_not_adopted(run, tmp_path):
    FisherKernelRunner(asking(run, tmp_path / "out")).run()
    plan = asking(run, tmp_path / "other", checkpoint={"path": str(run.after / "model")})
    other = FisherKernelRunner(plan)
    with load_workspace(tmp_path / "out" / "workspace") as workspace, pytest.raises(fk.PlanError, match="is of the"):
        other.adopt(workspace)


def test_a_temperature_other_than_the_samplers_is_warned_of(run, tmp_path):
    plan = asking(run, tmp_path / "out", numerics={"temperature": 0.7})
    with pytest.warns(fk.RolloutWarning, match="sampled at temperature 1 and are scored at 0.7"):
        FisherKernelRunner(plan).run()
