"""What a study cannot be made of is said."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fkernel as fk
from fkernel.rollout import SampleGenerator
from fkernel.study import FisherKernelRunner
from tests.study.test_runner import executed


def no_batch(generator: SampleGenerator) -> int:
    return 3


def test_memory_that_cannot_be_kept_is_said_with_what_is_needed(run, tmp_path):
    with pytest.raises(fk.BatchError, match="Give at least"):
        executed(run.plan(tmp_path / "out", numerics={"memory": "10KB"}))


def test_an_overflow_is_named_by_the_sequences_id(run, tmp_path, monkeypatch):
    runner = FisherKernelRunner(run.plan(tmp_path / "out"))
    with torch.no_grad():
        runner.checkpoint.model.model.embed_tokens.weight[60] = 3e38  # finite, and what is computed from it is not
    with pytest.raises(fk.NonFiniteError, match=r"U-00\d-0\d: "):
        runner.run()


def test_a_batch_of_another_checkpoint_is_refused(run, tmp_path):
    bare = {"form": "identity", "calibrated": False}
    plan = run.plan(tmp_path / "out", checkpoint={"path": str(run.after / "model")}, preconditioner=bare, step={})
    with pytest.raises(fk.RolloutError, match="another policy's"):
        executed(plan)


def test_a_callback_that_makes_no_batch_is_said(run, tmp_path):
    plan = run.plan(tmp_path, requests=[{"kind": "payload", "callback": "tests.study.test_refusals.no_batch"}])
    with pytest.raises(fk.PlanError, match="returned a int; expected a GeneratedBatch"):
        executed(plan)


def test_a_batch_without_fingerprint_is_held_against_the_policy(run, tmp_path):
    """Records that another program sampled carry log-probabilities, and those tell."""
    foreign = replace(run.batch, checkpoint=None)
    plan = run.plan(tmp_path / "out", update={"kind": "payload", "batch": foreign})
    results = executed(plan)
    assert [info.id for info in results.update] == run.batch.ids
    first = foreign.records[0]
    wrong = replace(first, logprobs=tuple(value - 0.01 for value in first.logprobs))
    other = replace(foreign, records=(wrong, *foreign.records[1:]))
    with pytest.raises(fk.RolloutError, match="Was it sampled from another checkpoint"):
        executed(run.plan(tmp_path / "other", update={"kind": "payload", "batch": other}))
