"""The commands around a study: what they print, what they write, how they fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from fkernel.cli import app
from fkernel.rollout import load_batch, save_batch
from fkernel.study import FisherKernelResults
from tests.study.test_workspace import asking


def kept(own):
    """K_UU, of a plan that keeps it."""
    assert own is not None
    assert own.kernel is not None
    return own.kernel


def told(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


@pytest.fixture(scope="module")
def study(run, tmp_path_factory):
    place = tmp_path_factory.mktemp("cli")
    plan = asking(run, place / "out", storage={"pictures": True})
    plan["requests"] += [{"kind": "update", "name": "self"}]
    (place / "study.yaml").write_text(yaml.safe_dump(plan))
    result = told("run", place / "study.yaml")
    return place, result


def test_run_writes_everything_and_prints_tables(study):
    place, result = study
    out = place / "out"
    assert {p.name for p in out.iterdir()} == {
        "plan.json", "results.json", "report.html", "kernel.npz", "environment.json", "log.jsonl", "pictures",
        "batches", "workspace", "lock",
    }  # fmt: skip
    assert "the page is" in result.stdout
    (agreement,) = (line for line in result.stdout.splitlines() if line.startswith("Predicted and realised changes"))
    assert agreement.endswith("."), "in a file a line is not wrapped"
    assert "<h1>" in (out / "report.html").read_text(encoding="utf-8")
    for picture in ("held_out_heatmap", "held_out_influence", "held_out_contributors", "spectrum"):
        assert (out / "pictures" / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    assert {"held_out", "self"} == {p.name for p in (out / "batches").iterdir()}
    for word in (
        "held_out: log π of 2 sequences",
        "Predicted and realised changes",
        "moved most",
        "momentum",
        "Wrote",
        "fkernel ask",
    ):
        assert word in result.stdout
    assert len(result.stdout.splitlines()) <= 40
    assert "for gradients and kernels" in result.stderr
    tables = told("show", out).stdout
    for word in ("held_out: the 2 sequences", "Pearson r", "momentum", "effective rank"):
        assert word in tables


@pytest.mark.turns(6)
def test_run_again_gives_the_same_and_another_plan_does_not_overwrite(study, run):
    place, _ = study
    before = (place / "out" / "results.json").read_bytes(), (place / "out" / "kernel.npz").read_bytes()
    found = json.loads(told("run", place / "out" / "plan.json", "--json", "--log", "minimal").stdout)
    assert set(found["requests"]) == {"held_out", "self"}
    assert ((place / "out" / "results.json").read_bytes(), (place / "out" / "kernel.npz").read_bytes()) == before
    ends = [json.loads(line) for line in (place / "out" / "log.jsonl").read_text().splitlines()]
    counts = [line["gradients_computed"] for line in ends if "gradients_computed" in line]
    assert counts == [9, 0]
    other = place / "other.yaml"
    other.write_text(yaml.safe_dump(asking(run, place / "out", self_kernel=False)))
    assert "holds results of another plan" in told("run", other, code=2).stderr
    assert (place / "out" / "results.json").read_bytes() == before[0]


def _at_start(place):
    plan = json.loads((place / "out" / "plan.json").read_text())
    (place / "start.json").write_text(json.dumps({**plan, "step": {**plan["step"], "path": "start"}}))
    return place / "start.json"


def test_query(study):
    place, _ = study
    workspace = place / "out" / "workspace"
    said = told("query", workspace, "U-000-01", "U-002-00").stdout
    assert "K(U-000-01, U-002-00) = " in said
    assert "U-002-00 moves U-000-01 by" in said
    found = json.loads(told("query", workspace, "U-000-01", "U-002-00", "--json").stdout)
    results = FisherKernelResults.load(place / "out")
    assert results.self_kernel is not None  # two sequences of U are where U's gradients are: at the checkpoint
    assert found["kernel"] == pytest.approx(kept(results.self_kernel)[1, 6], rel=1e-4)
    batch = place / "out" / "batches" / "held_out"
    outside = json.loads(told("query", workspace, "E-001-00", "U-002-00", "--batch", batch, "--json").stdout)
    assert results["held_out"].path == "midpoint"  # and another's halfway along the step, as its request has it
    assert outside["kernel"] == pytest.approx(results["held_out"].kept("kernel")[1, 6], rel=1e-4)
    assert outside["contribution"] == pytest.approx(results["held_out"].kept("contributions")[1, 6], rel=1e-4)
    start = told("query", workspace, "E-001-00", "U-002-00", "--batch", batch, "--plan", _at_start(place), "--json")
    assert abs(json.loads(start.stdout)["kernel"] / outside["kernel"] - 1) > 1e-3
    assert "no sequence 'U-000-99'" in told("query", workspace, "U-000-99", "U-002-00", code=2).stderr


def test_query_refuses_a_batch_that_the_results_are_not_about(study, run, tmp_path):
    """Other draws have the same ids."""
    place, _ = study
    out = tmp_path / "out"
    shutil.copytree(place / "out", out)
    spec = "query", out / "workspace", "E-001-00", "U-002-00", "--batch", out / "batches" / "held_out"
    told(*spec)
    drawn = load_batch(out / "batches" / "held_out")
    pairs = zip(drawn, drawn.records[::-1], strict=True)
    swapped = replace(drawn, records=tuple(replace(b, sequence_id=a.sequence_id) for a, b in pairs))
    save_batch(swapped, out / "batches" / "held_out", replace=True)
    said = " ".join(told(*spec, code=2).stderr.split())
    assert "is of another run than the results" in said
    assert "are about other sequences" in said
    save_batch(drawn, out / "batches" / "older")
    said = " ".join(told(*spec[:-1], out / "batches" / "older", code=2).stderr.split())
    assert "have no request 'older'" in said
    save_batch(swapped, tmp_path / "elsewhere")  # of no results: it is asked of by itself
    told(*spec[:-1], tmp_path / "elsewhere")
    (out / "results.json").unlink()
    save_batch(drawn, out / "batches" / "held_out", replace=True)
    assert "no readable results.json" in " ".join(told(*spec, code=2).stderr.split())


def test_an_id_of_two_sequences_is_not_guessed(study, run, tmp_path):
    place, _ = study
    workspace = place / "out" / "workspace"
    other = replace(
        run.batch,
        records=tuple(replace(one, sequence_id=f"U-000-0{i}") for i, one in enumerate(run.batch.records[3:6])),
    )
    save_batch(other, tmp_path / "other")
    said = told("query", workspace, "U-000-01", "U-002-00", "--batch", tmp_path / "other", code=2).stderr
    assert "'U-000-01' is the id of 2 different sequences" in " ".join(said.split())
    named = ("query", workspace, "U-002-00", "other/U-000-01", "--batch", tmp_path / "other", "--json")
    found = json.loads(told(*named).stdout)
    K = FisherKernelResults.load(place / "out")["self"].kept("kernel")
    assert found["kernel"] == pytest.approx(K[4, 6], rel=1e-4)  # of the sequence outside of U along the step
    assert found["contribution"] is None  # U's sequence of that id has a weight, and it is another one
    plain = json.loads(told("query", workspace, "U-002-00", "U-000-01", "--json").stdout)
    own = FisherKernelResults.load(place / "out").self_kernel
    assert own is not None
    assert plain["kernel"] == pytest.approx(kept(own)[6, 1], rel=1e-4)
    assert abs(plain["kernel"] / found["kernel"] - 1) > 0.1


@pytest.mark.turns(6)
def test_pictures_of_requests_that_are_gone_do_not_stay(study, run, tmp_path):
    place, _ = study
    out = tmp_path / "out"
    shutil.copytree(place / "out", out)
    (out / "pictures" / "mine.png").write_bytes(b"mine")
    plan = asking(run, out, storage={"pictures": True}, self_kernel=False)
    plan["requests"] = [{"kind": "custom_sequence", "name": "probe", "prompt": "3+4=", "response": "7"}]
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(plan))
    told("run", tmp_path / "other.yaml", "--overwrite")
    left = {picture.name for picture in (out / "pictures").iterdir()}
    assert "mine.png" in left
    assert not [name for name in left if name.startswith(("held_out", "self", "spectrum"))]


def test_influence(study):
    place, _ = study
    workspace = place / "out" / "workspace"
    assert "Σ C" in told("influence", workspace).stdout
    found = json.loads(told("influence", workspace, "--id", "U-001-*", "--json").stdout)
    assert [*found] == ["U-001-00", "U-001-01", "U-001-02"]
    changed = told("influence", workspace, "--advantages", "rloo", "--set", "U-000-00=0").stdout
    assert "under others" in changed
    assert "expected ID=NUMBER" in told("influence", workspace, "--set", "U-000-00", code=2).stderr
    assert "no advantage rule 'nonsense'" in told("influence", workspace, "--advantages", "nonsense", code=2).stderr


def test_show(study, tmp_path):
    place, _ = study
    assert "held_out: the 2 sequences" in told("show", place / "out").stdout
    found = json.loads(told("show", place / "out", "--request", "self", "--json").stdout)
    assert set(found["requests"]) == {"self"}
    told("show", place / "out", "--netcdf", tmp_path / "study.nc")
    assert (tmp_path / "study.nc").stat().st_size > 1000
    assert "no request 'nothing'" in told("show", place / "out", "--request", "nothing", code=2).stderr
    assert "holds neither results.json nor account.json" in told("show", tmp_path, code=2).stderr


def test_plan_init_check_and_schema(study, tmp_path):
    place, _ = study
    told("plan", "init", tmp_path / "new.yaml")
    assert "something at" in told("plan", "init", tmp_path / "new.yaml", code=2).stderr
    assert "checkpoint.path: there is nothing at" in told("plan", "check", tmp_path / "new.yaml", code=2).stderr
    assert "There is no plan at" in told("plan", "check", tmp_path / "other.yaml", code=2).stderr
    assert "held_out (evaluation)" in told("plan", "check", place / "study.yaml").stdout
    assert json.loads(told("plan", "check", place / "study.yaml", "--json").stdout)["self_kernel"] is True
    assert "properties" in json.loads(told("plan", "schema").stdout)


@pytest.mark.turns(6)
def test_every_command_has_help_with_an_example():
    for command in ("demo", "sample", "run", "query", "influence", "show", "estimate"):
        assert f"Example: fkernel {command}" in " ".join(told(command, "--help").stdout.split())
    for command in ("init", "check", "schema"):
        assert f"Example: fkernel plan {command}" in " ".join(told("plan", command, "--help").stdout.split())


def test_a_plan_that_is_wrong_is_said_without_a_traceback(tmp_path):
    (tmp_path / "plan.yaml").write_text("checkpoint: 3\n")
    said = told("run", tmp_path / "plan.yaml", code=2).stderr
    assert "checkpoint: expected a valid dictionary" in said


@pytest.mark.parametrize("command", ["run p.yaml", "explain c --batch b", "account r --probes p", "report o", "demo"])
def test_an_empty_path_is_not_the_current_folder(command):
    assert "it is empty" in told(*command.split(), "--out", "", code=2).output


def test_a_log_level_that_there_is_not(study):
    place, _ = study
    assert (
        "--log is 'loud'; expected minimal, normal" in told("run", place / "study.yaml", "--log", "loud", code=2).stderr
    )


@pytest.mark.turns(6)
def test_ctrl_c_leaves_a_workspace_that_the_same_command_finishes(run, tmp_path):
    """A real process, a real signal, in the middle of U's gradients."""
    plan = asking(run, tmp_path / "out", numerics={"microbatch": 1})
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(plan))
    command = [sys.executable, "-c", "from fkernel.cli import app; app()", "run", str(tmp_path / "study.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    root = Path(__file__).parents[2]
    process = subprocess.Popen(command, cwd=root, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    journal = tmp_path / "out" / "workspace" / "gradients" / "shards.jsonl"
    while not journal.exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode in (130, 0), err.decode()
    if process.returncode == 130:
        assert b"the same command computes the rest" in err
        assert b"Traceback" not in err
    told("run", tmp_path / "study.yaml")
    assert FisherKernelResults.load(tmp_path / "out")["held_out"].kept("kernel").shape == (2, 9)
