"""Steps that are mis-described as a new user would: the audit of a study says what is wrong."""

from __future__ import annotations

import json
import logging
import shutil
from typing import Any

import numpy as np
import pytest

import fkernel as fk
from fkernel.study import FisherKernelResults, FisherKernelRunner
from tests.study.conftest import MAX_NORM

QUIET: dict[str, Any] = {"storage": {"persist": False, "pictures": False}}
OTHER: dict[str, Any] = {
    "kind": "update",
    "batch_size_prompts": 3,
    "completions_per_prompt": 3,
    "reward": "tests.study.conftest.brevity",
}


def audited(plan: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    results = FisherKernelRunner(plan | QUIET).run()
    return results.step["audit"], results


def kinds(audit: dict[str, Any]) -> set[str]:
    return {finding["kind"] for finding in audit["findings"]}


def test_a_step_that_is_the_one_described_has_no_findings(run, tmp_path):
    audit, results = audited(run.plan(tmp_path))
    assert audit["fine"], audit["verdict"]
    assert results["held_out"].facts["audit"] == "the step is the one described"
    for name in ("batch", "momentum", "decay"):
        assert audit["overall"]["coefficients"][name] == pytest.approx(1, abs=0.01)


def test_another_batch_than_the_one_that_was_trained_on_is_named(run, tmp_path, caplog):
    plan = run.plan(tmp_path, update=OTHER, analyses={"ledger": True})
    with caplog.at_level(logging.WARNING):
        audit, results = audited(plan)
    assert "left" in kinds(audit), audit["verdict"]
    assert "another batch, or other weights" in audit["verdict"]
    assert any("audit of the step" in message and "another batch" in message for message in caplog.messages)
    ledger = results["held_out"].analysis("ledger")
    assert ledger.facts["unexplained"] > 0.2
    assert ledger.facts["error"] < 0.01  # it is not filed under what the path leaves
    results.save_results(tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "another batch" in kept["step"]["audit"]["verdict"]
    assert "another batch" in FisherKernelResults.load(tmp_path / "out")["held_out"].facts["audit"]


def test_a_tokenizer_with_two_digits_swapped_is_named(run, tmp_path):
    place = tmp_path / "before"
    shutil.copytree(run.before, place)
    tokenizer = json.loads((place / "model" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["4"], vocabulary["5"] = vocabulary["5"], vocabulary["4"]
    (place / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    plan = run.plan(tmp_path / "out", checkpoint={"path": str(place)}, update=OTHER | {"seed": 4})
    audit, _ = audited(plan)
    assert "left" in kinds(audit), audit["verdict"]


def test_a_step_without_its_clipping_is_named(run, tmp_path):
    plan = run.plan(tmp_path)
    clipped = FisherKernelRunner(plan | QUIET).run().step["clip"]
    assert clipped < 1
    audit, _ = audited(plan | {"step": {"after": plan["step"]["after"]}})
    assert "clipping" in kinds(audit), audit["verdict"]
    audit, _ = audited(plan | {"step": {"after": plan["step"]["after"], "max_norm": 2 * MAX_NORM}})
    assert kinds(audit) & {"clipping", "batch_scale", "batch_missing"}, audit["verdict"]


@pytest.mark.parametrize("optimizer", [{"kind": "lion", "lr": 1e-5}, {"kind": "sgd", "lr": 1e-2, "momentum": 0.9}])
def test_a_run_s_first_step_with_another_optimizer(run, tmp_path, optimizer):
    """No state yet; contributions are a secant's, and what rests on sums that cancel is told beside them."""
    place = tmp_path / "start"
    shutil.copytree(run.before / "model", place)
    plan = run.plan(tmp_path / "out", checkpoint={"path": str(place)}, analyses={"ledger": True})
    plan["step"] = {"max_norm": MAX_NORM, "optimizer": optimizer}
    results = FisherKernelRunner(plan | QUIET).run()
    found = results["held_out"]
    assert results.step["optimizer"] == {"lion": "Lion", "sgd": "SGD"}[optimizer["kind"]]
    assert 0 <= results.step["cancellation"] <= 1
    assert (results.step["cancellation"] > 0.02) == (optimizer["kind"] == "lion")  # whose sign makes much of little
    assert found.calibration["predicted"].relative_error < 0.02
    np.testing.assert_allclose(found.kept("contributions").sum(1), found.batch, rtol=1e-3, atol=1e-8)
    assert not found.kept("momentum").any()


def test_an_optimizer_that_mixes_coordinates_is_refused_in_a_plan(run, tmp_path):
    place = tmp_path / "start"
    shutil.copytree(run.before / "model", place)
    plan = run.plan(tmp_path / "out", checkpoint={"path": str(place)})
    plan["step"] = {"max_norm": MAX_NORM, "optimizer": {"kind": "adafactor", "lr": 1e-4}}
    with pytest.raises(fk.OptimizerStateError, match="mixes coordinates"):
        FisherKernelRunner(plan | QUIET).run()
