"""What `fkernel demo` must show: the last step, predicted before it is taken, met by the step really taken."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import fkernel.demo
from fkernel.cli import app
from fkernel.demo.explain import demo_plan
from fkernel.study import FisherKernelResults, FisherKernelRunner
from fkernel.study.config.requests import FromFile

REQUESTS = ["held_out", "self", "three_prompts", "probes"]


@pytest.fixture
def tiny_demo(monkeypatch, tiny, tmp_path):
    """The command on a tiny configuration."""
    monkeypatch.setattr(fkernel.demo, "seeded", lambda seed: tiny)
    return ["demo", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]


def test_explanation_meets_the_real_step(prepared, tmp_path):
    results = FisherKernelRunner(demo_plan(prepared, tmp_path / "out")).run()
    assert list(results.requests) == REQUESTS
    for name in ("held_out", "self"):
        assert results[name].calibration["predicted"].relative_error < 0.02
        assert results[name].calibration["predicted"].pearson > 0.999
        assert results[name].path == "midpoint"
    weights = [u.weight * u.advantage for u in results.update if u.weight is not None and u.advantage is not None]
    found = results["held_out"]
    assert found.contributions == pytest.approx(
        found.kept("kernel") * weights * results.step["clip"], rel=1e-5, abs=1e-9
    )
    right, wrong = results["probes"].evaluation
    assert (right.prompt, right.response, wrong.response) == ("37+85=", "122", "123")


def test_a_path_may_hold_what_yaml_would_take_for_its_own(prepared, tmp_path):
    out = tmp_path / "it's: #1, [here]"
    plan = demo_plan(prepared, out, seed=3)
    assert (plan.out, plan.numerics.seed) == (str(out), 3)
    assert isinstance(plan.update, FromFile)
    assert plan.update.path == str(prepared / "update")


@pytest.mark.turns(6)
def test_command_writes_everything_and_a_second_run_uses_the_cache(tiny_demo, tmp_path):
    result = CliRunner().invoke(app, [*tiny_demo, "--rows", "10"])
    assert result.exit_code in (0, 1), result.output  # so small a policy need not meet the demo's bounds
    for word in (
        "predicted change",
        "momentum",
        "top three contributors",
        "Pearson r",
        "Wrote",
        "37+85=123",
        "the ledger",
    ):
        assert word in result.output
    out = tmp_path / "out"
    assert {"results.json", "kernel.npz", "plan.json", "pictures", "workspace"} <= {p.name for p in out.iterdir()}
    kept = sorted((tmp_path / "cache").rglob("*"))
    times = [p.stat().st_mtime_ns for p in kept]
    CliRunner().invoke(app, tiny_demo)
    assert [p.stat().st_mtime_ns for p in sorted((tmp_path / "cache").rglob("*"))] == times
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["gradients_computed"] for line in lines if "gradients_computed" in line] == [24, 0]


@pytest.mark.turns(6)
def test_prediction_out_of_bounds_is_said_and_exits_with_1(tiny_demo, monkeypatch):
    monkeypatch.setattr("fkernel.cli.BOUNDS", {"predicted": 0.0})
    result = CliRunner().invoke(app, tiny_demo)
    assert result.exit_code == 1
    assert "the prediction missed its bounds: predicted" in result.output


def test_unusable_directory_is_the_users_mistake_without_a_traceback(tiny_demo, tmp_path):
    (tmp_path / "out").write_text("a file where the directory should be")
    result = CliRunner().invoke(app, tiny_demo)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert "fkernel:" in result.output


@pytest.mark.turns(8)
@pytest.mark.timeout(900)
def test_demo_meets_its_required_calibration(tmp_path):
    """The real command, as `make demo` runs it."""
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")])
    assert result.exit_code == 0, result.output
    results = FisherKernelResults.load(tmp_path / "out")
    found = results["held_out"].calibration["predicted"]
    assert found.pearson >= 0.9999
    assert abs(found.slope - 1) <= 0.002
    assert found.relative_error <= 0.002
    ledger = results["held_out"].analysis("ledger")
    left = np.linalg.norm(ledger["remainder"] + ledger["unexplained"]) / np.linalg.norm(ledger["realised"])
    assert left == pytest.approx(found.relative_error, rel=0.02)
    assert ledger.facts["unexplained"] < ledger.facts["error"]
    assert {"part.raised", "part.lowered"} <= {*ledger.arrays}
    assert results.step["audit"]["fine"], results.step["audit"]["verdict"]
    assert ledger.facts["floor"] < 3 * ledger.facts["error"]
    low, high = results["held_out"].analysis("sweep").facts["first_holds"]
    assert low < 0.2 < high < 5
    agreement = results["held_out"].analysis("preconditioners").facts["agreement"]
    assert agreement["post-step"]["of_batch"] == max(row["of_batch"] for row in agreement.values()) > 0.999
    assert results["probes"].analysis("observables.right-over-wrong")["realised"].shape == (1,)
    assert 0.4 <= results.step["sampling"]["mean_reward"] <= 0.8
    assert results.step["step"] >= 3
    data = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {len(row["top_contributors"]) for row in data["requests"]["held_out"]["evaluation"]} == {10}
