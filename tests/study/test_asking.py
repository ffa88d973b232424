"""One more probe of a finished study: the same answer as if the plan had asked, and nothing of U is computed again."""

from __future__ import annotations

import errno
import json
from typing import Any

import numpy as np
import pytest

from fkernel.errors import PlanError
from fkernel.study import FisherKernelResults, FisherKernelRunner, ask, influence_of, load_workspace
from tests.study.test_cli import told
from tests.torture.operations import READ_ONLY, Stop, watched

SAMPLES = [{"prompt": "3+4=", "response": "7"}, {"prompt": "3+4=", "response": "8"}]


@pytest.fixture(scope="module")
def study(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("asking") / "out"
    requests = [{"kind": "payload", "name": "probes", "samples": SAMPLES}]
    results = FisherKernelRunner(run.plan(out, requests=requests, self_kernel=False)).run()
    results.save_results(out)
    return out, results


def test_the_answer_is_that_of_a_plan_that_asks(study):
    out, results = study
    before = {path: path.stat().st_mtime_ns for path in (out / "workspace").rglob("*") if path.is_file()}
    asked = ask(out / "workspace", [SAMPLES[1], {**SAMPLES[0], "name": "right"}])
    assert [info.id for info in asked.evaluation] == ["probe-1", "right"]
    own: Any = results["probes"]
    np.testing.assert_allclose(
        np.asarray(asked.kept("contributions")), own.kept("contributions")[::-1], rtol=2e-3, atol=1e-7
    )
    np.testing.assert_allclose(np.asarray(asked.realised), own.realised[::-1], rtol=1e-3, atol=1e-7)
    after = {path: path.stat().st_mtime_ns for path in (out / "workspace").rglob("*") if path.is_file()}
    assert {path for path in before if after.get(path) != before[path] and path.name != "lock"} == set()


def test_questions_need_no_right_to_write(study):
    """As on a read-only file system, where two ask at the same time."""
    out, results = study
    with watched(out, Stop(1, "error", errno.EROFS, READ_ONLY)), load_workspace(out / "workspace") as opened:
        asked = ask(out / "workspace", [SAMPLES[0]])
        assert influence_of(opened).keys() == {info.id for info in results.update}
        assert opened.cache("U-000-00").norm > 0
    np.testing.assert_allclose(np.asarray(asked.realised), results["probes"].realised[:1], rtol=1e-3, atol=1e-7)
    FisherKernelResults.load(out)


@pytest.mark.turns(6)
def test_the_commands(study):
    out, results = study
    said = told("ask", out / "workspace", "--probe", "3+4=", "7").stdout
    assert "probe-1" in said
    assert "momentum" in said
    record = json.loads(told("ask", out / "workspace", "--probe", "3+4=", "7", "--json").stdout)
    assert record["evaluation"][0]["realised"] == pytest.approx(results["probes"].realised[0], rel=1e-3)
    entry = json.loads(
        told("query", out / "workspace", "probe-1", "U-001-00", "--probe", "3+4=", "7", "--json").stdout
    )  # fmt: skip
    assert entry["kernel"] == pytest.approx(results["probes"].kept("kernel")[0, 3], rel=2e-3)


def test_mistakes(study, tmp_path):
    out, _ = study
    with pytest.raises(PlanError, match="There is no probe"):
        ask(out / "workspace", [])
    with pytest.raises(PlanError, match="There is no plan at"):
        ask(out / "workspace", SAMPLES, plan=tmp_path / "plan.json")
