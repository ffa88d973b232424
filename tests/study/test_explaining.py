"""From a checkpoint to a culprit in one line: `fkernel explain` without a plan."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from fkernel.errors import PlanError
from fkernel.study import FisherKernelPlan, FisherKernelResults, FisherKernelRunner, explanation, read_plan
from tests.study.conftest import MAX_NORM
from tests.study.recorded_runs import STEPS, recording_of
from tests.study.test_cli import told

PROBES = ("--probe", "3+4=", "7", "--probe", "3+4=", "8")


@pytest.fixture(scope="module")
def explained(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("explain") / "out"
    result = told("explain", run.before, "--batch", run.update, "--max-norm", MAX_NORM, "--after", run.after,
                  "--out", out, *PROBES)  # fmt: skip
    return out, result


def test_it_says_what_it_took_and_what_it_found(explained):
    out, result = explained
    said = " ".join(result.stderr.split())
    assert "default: the loss is the policy gradient" in said
    assert "default: a probe's prompt is the whole text" in said
    assert "step.after" not in said
    assert "probe-1" in result.stdout
    results = FisherKernelResults.load(out)
    assert [info.id for info in results["probes"].evaluation] == ["probe-1", "probe-2"]
    assert results["probes"].calibration["predicted"].relative_error < 0.02
    assert results["probes"].facts["realised_on"] == "step.after"


def test_the_plan_that_it_ran_runs_again(explained, tmp_path):
    out, _ = explained
    again = read_plan(out / "plan.yaml", FisherKernelPlan)
    assert again.hash == FisherKernelPlan.model_validate(json.loads((out / "plan.json").read_text())).hash
    results = FisherKernelRunner({**yaml.safe_load((out / "plan.yaml").read_text()), "out": str(tmp_path)}).run()
    before = FisherKernelResults.load(out)["probes"]
    np.testing.assert_allclose(results["probes"].kept("contributions"), before.kept("contributions"), rtol=1e-5)


@pytest.mark.turns(6)
def test_a_recording_needs_no_checkpoint_beside_it(tmp_path):
    place = recording_of("dapo").directory
    told("explain", place, "--batch", f"{place}:5", "--out", tmp_path / "out", *PROBES)
    results = FisherKernelResults.load(tmp_path / "out")
    assert results.plan["checkpoint"]["step"] == 5
    assert results.plan["step"]["clip"] == pytest.approx(results.step["clip"])
    assert results["probes"].facts["audit"] == "the step is the one described"


@pytest.mark.parametrize(
    ("batch", "probes", "settings", "message"),
    [
        ("{run}/update", [], {}, "There is no probe"),
        ("{run}/update", [("1", "2")], {}, "step.max_norm: to which the training clipped"),
        ("{run}/nothing", [("1", "2")], {}, "there is nothing at .*nothing; expected a recording"),
        ("{run}/nothing:3", [("1", "2")], {}, "there is nothing at .*nothing; expected a recording"),
        ("{recording}", [("1", "2")], {}, f"is a recording of {STEPS} steps, 0 to {STEPS - 1}; say which"),
        ("{recording}:99", [("1", "2")], {}, "holds no step 99"),
        ("{run}/before", [("1", "2")], {"step.max_norm": None}, "holds no file of a dump that is known"),
        ("{run}/update", [("1", "2")], {"step.max_norm": None, "out.here": 1}, "out has no keys"),
        ("{run}/update", [("1", "2")], {"step.max_morn": 1}, "did you mean 'max_norm'"),
    ],
)
def test_it_asks_for_what_it_cannot_know(run, batch, probes, settings, message):
    place = batch.format(run=run.before.parent, recording=recording_of("dapo").directory)
    with pytest.raises(PlanError, match=message):
        explanation(run.before, place, probes, settings=settings)


def test_what_a_dump_lacks_is_asked_for_at_once(run, tmp_path):
    rows = {"token_ids": [5, 6, 7], "token_loss_mask": [0, 1, 1], "advantages": [0.0, 0.5, 0.5], "rewards": 1.0}
    rows |= {"generation_logprobs": [0.0, -1.0, -2.0], "prev_logprobs": [0.0, -1.1, -2.1], "input_lengths": 3}
    line = {name: [value] for name, value in (rows | {"sample_loss_mask": 1.0}).items()} | {"idx": 0}
    (tmp_path / "train_data_step12.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(PlanError) as caught:
        explanation(run.before, f"{tmp_path}:12", [("1", "2")])
    for key in ("update.loss:", "update.weights:", "step.max_norm:", "--set KEY=VALUE"):
        assert key in str(caught.value)
    settings = {"update.loss.kind": "policy_gradient", "update.weights": "dapo", "update.batch_size": 1}
    settings |= {"step.max_norm": 1.0, "sampling.temperature": 1.0}
    made = explanation(run.before, f"{tmp_path}:12", [("1", "2")], settings=settings)
    assert made.plan.update.kind == "trainer_dump"
    assert made.plan.step.max_norm == 1.0


@pytest.mark.turns(6)
def test_another_checkpoint_than_the_one_before_the_step_is_refused(tmp_path):
    run = recording_of("dapo").directory.parent
    said = told("explain", run / "run" / f"checkpoint-{STEPS}", "--batch", f"{run / 'recording'}:5",
                "--out", tmp_path / "out", *PROBES, code=2).stderr  # fmt: skip
    assert f"the plan's checkpoint is after {STEPS}" in " ".join(said.split())


def test_options_are_checked(run):
    common = ("explain", run.before, "--batch", run.update, *PROBES)
    assert "expected a number, or none" in told(*common, "--max-norm", "one", code=2).stderr
    assert "expected KEY=VALUE" in told(*common, "--set", "weights", code=2).stderr
