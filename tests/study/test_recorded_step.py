"""A study of one step that reads a recording: the batch that was really used, and the audit agrees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fkernel.errors import FKernelError, PlanError
from fkernel.record import checkpoint_before
from fkernel.rollout import Sampling, score
from fkernel.study import FisherKernelPlan, FisherKernelRunner, account_recording, as_recorded, check_inputs
from tests.study.recorded_runs import KINDS, PROBES, recording_of

STEP = 5


def plan_of(kind: str, out: Path, **more: Any) -> FisherKernelPlan:
    samples = [{"prompt": row["prompt"], "response": row["response"], "raw": True} for row in PROBES]
    return FisherKernelPlan.model_validate(
        {
            "checkpoint": {"recording": str(recording_of(kind).directory), "step": STEP},
            "update": {"kind": "recorded"},
            "template": "bare",
            "requests": [{"kind": "payload", "samples": samples, "name": "probes"}],
            "out": str(out),
            **more,
        }
    )


@pytest.mark.turns(6)
@pytest.mark.parametrize("kind", [*KINDS, "temperature 0.7"])
def test_the_step_explained_is_the_step_that_was_taken(tmp_path, kind):
    results = FisherKernelRunner(plan_of(kind, tmp_path / "out")).run()
    probes = results["probes"]
    assert results.step["audit"]["fine"], results.step["audit"]
    assert probes.facts["realised_on"] == "step.after"
    assert probes.realised is not None
    assert probes.unexplained is not None
    moved = float(np.linalg.norm(probes.realised))
    assert float(np.linalg.norm(probes.predicted - probes.realised)) <= 3e-3 * moved
    assert float(np.linalg.norm(probes.unexplained)) <= 1e-4 * moved
    assert (probes.arithmetic is not None) == kind.startswith("bf16")
    made = account_recording(recording_of(kind), PROBES, tmp_path / "account", steps=range(STEP, STEP + 1))
    ours = probes.kept("contributions") if probes.contributions is not None else None
    assert probes.batch is not None
    assert probes.momentum is not None
    assert np.allclose(made["contributions"].sum(1), probes.batch, atol=1e-4 * moved)
    if ours is not None:
        assert np.allclose(made["contributions"], ours, atol=1e-4 * moved)
    assert np.allclose(made["before"], probes.momentum, atol=1e-4 * moved)


def test_log_probabilities_at_another_temperature_are_scored_anew(tmp_path):
    """A trainer computes them at its temperature; results, and a batch's summary, show them at 1."""
    recording = recording_of("temperature 0.7")
    assert not recording.step(STEP).records[0].logprobs
    results = FisherKernelRunner(plan_of("temperature 0.7", tmp_path / "out")).run()
    assert results.step["audit"]["fine"]
    loaded = checkpoint_before(recording, STEP)
    batch = recording.step(STEP).batch
    known = score(loaded.model, batch.sequences, Sampling())
    assert [info.logprob for info in results.update] == pytest.approx([sum(each.logprobs) for each in known], rel=1e-5)
    assert batch.diagnostics["logprob"] is None


def test_what_the_plan_says_is_left_as_it_is(tmp_path):
    filled = as_recorded(plan_of("dapo", tmp_path, step={"max_norm": 0.7, "microbatches": 4, "attention": "eager"}))
    assert filled.step.max_norm == 0.7
    assert filled.step.clip is None
    assert filled.step.microbatches == 4
    assert filled.step.attention == "eager"
    assert filled.step.loss is not None
    assert filled.step.loss.kind == "token_weights"
    assert filled.step.after is not None
    assert filled.step.after.step == STEP + 1
    assert as_recorded(filled) == filled


@pytest.mark.turns(6)
def test_a_step_between_snapshots_is_replayed(tmp_path):
    sparse = recording_of("dapo", "first")
    plan = plan_of("dapo", tmp_path / "out", checkpoint={"recording": str(sparse.directory), "step": STEP})
    results = FisherKernelRunner(plan).run()
    every = FisherKernelRunner(plan_of("dapo", tmp_path / "other")).run()
    assert plan.step.after is None
    assert np.allclose(results["probes"].predicted, every["probes"].predicted, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"checkpoint": {"path": "x", "recording": "y", "step": 1}}, "exactly one of path and recording"),
        ({"checkpoint": {"recording": "y"}}, "a recording needs one"),
        ({"checkpoint": {"path": "x", "step": 3}}, "step is a recording's"),
    ],
)
def test_wrong_keys(tmp_path, given, said):
    with pytest.raises(ValueError, match=said):
        plan_of("dapo", tmp_path, **given)


def test_what_is_not_there(tmp_path):
    with pytest.raises(PlanError, match="needs a recording and a step"):
        as_recorded(plan_of("dapo", tmp_path, checkpoint={"path": str(tmp_path)}))
    with pytest.raises(PlanError, match="there is nothing at"):
        as_recorded(
            plan_of("dapo", tmp_path, update={"kind": "recorded", "recording": str(tmp_path / "no"), "step": 1})
        )
    with pytest.raises(FKernelError, match="no step 40"):
        as_recorded(plan_of("dapo", tmp_path, update={"kind": "recorded", "step": 40}))


def test_a_plan_whose_checkpoint_names_the_recording_is_checked(tmp_path):
    plan = plan_of("dapo", tmp_path / "out")
    check_inputs(plan)  # before the recording is filled in, as `fkernel plan check` does
    unknown = {"counterfactuals": [{"name": "x", "drop": ["nobody"]}]}
    with pytest.raises(PlanError, match="'nobody' names no sequence of U; it has"):
        check_inputs(plan_of("dapo", tmp_path / "out", analyses=unknown))


def test_a_request_of_a_recorded_step_names_it(tmp_path):
    with pytest.raises(ValueError, match="name the recording and the step"):
        plan_of("dapo", tmp_path, requests=[{"kind": "recorded", "step": 3}])


def test_a_request_of_another_recorded_step_is_scored_by_the_plans_checkpoint(tmp_path):
    recording = recording_of("dapo")
    request = {"kind": "recorded", "name": "later", "recording": str(recording.directory), "step": STEP + 2}
    plan = plan_of("dapo", tmp_path / "out", requests=[request], storage={"persist": False, "pictures": False})
    runner = FisherKernelRunner(plan)
    later = runner.run()["later"]
    batch = recording.step(STEP + 2).batch
    assert [each.id for each in later.evaluation] == batch.ids
    own = score(runner.checkpoint.model, batch.sequences, Sampling(temperature=1.0))
    expected = [sum(each.logprobs) for each in own]
    np.testing.assert_allclose([each.logprob for each in later.evaluation], expected, rtol=1e-5)
    assert np.abs(np.subtract(expected, [sum(record.logprobs) for record in batch])).max() > 1e-3  # its own policy's
    assert later.predicted is not None
    assert later.realised is not None
    np.testing.assert_allclose(later.predicted, later.realised, atol=0.02 * np.abs(later.realised).max())
