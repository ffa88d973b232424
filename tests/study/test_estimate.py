"""`fkernel estimate PLAN`: what a run will take, from a plan and lengths, before anything is computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fkernel.cli import app
from fkernel.engine.planning import Rates
from fkernel.errors import BatchError, PlanError
from fkernel.study import FisherKernelPlan, FisherKernelRunner, forecast

RATES = Rates(flops=1e11, moved=1e10, call=5e-6, forming=1e11, write=1e9, read=2e9)


@pytest.fixture(autouse=True)
def _known_rates(monkeypatch):
    monkeypatch.setattr("fkernel.study.phases.rates", lambda dtype: RATES)
    monkeypatch.setattr("fkernel.study.rows.rates", lambda dtype: RATES)


def written(run: Any, place: Path, **changes: Any) -> Path:
    file = place / "plan.json"
    file.write_text(json.dumps(run.plan(place / "out", **changes)))
    return file


def foretold(run: Any, place: Path, **changes: Any) -> Any:
    return forecast(FisherKernelPlan.model_validate(run.plan(place / "out", **changes)))


def test_nothing_is_computed_and_every_phase_is_told(run, tmp_path):
    done = CliRunner().invoke(app, ["estimate", str(written(run, tmp_path)), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [phase["name"] for phase in found["phases"]] == ["gradients of U", "U with itself", "request held_out"]
    assert found["phases"][0]["sequences"] == len(run.batch)
    assert found["phases"][0]["tokens"] == max(len(r.prompt_ids) + len(r.response_ids) for r in run.batch)
    assert found["memory"] == found["model"] + max(phase["memory"] for phase in found["phases"])
    assert found["seconds"] == pytest.approx(sum(phase["seconds"] for phase in found["phases"]))
    assert not (tmp_path / "out").exists()


def test_a_table_says_what_was_assumed(run, tmp_path):
    done = CliRunner().invoke(app, ["estimate", str(written(run, tmp_path)), "--memory", "64MiB"])
    assert done.exit_code == 0, done.output
    assert "memory grant 64.00 MiB" in done.stdout
    assert "Assumed: held_out: 4 sequences as long as any, 4 tokens and 6 drawn" in done.stdout


@pytest.mark.turns(6)
def test_the_run_does_what_was_foretold(run, tmp_path, monkeypatch):
    """Tiles, blocks and microbatches that the run walks by are those of the forecast."""
    from fkernel.study import rows as module

    used, real = [], module.choose_meeting

    def watched(*given):
        used.append(real(*given))
        return used[-1]

    requests = [{"kind": "from_file", "name": "E", "path": str(run.update)}]
    changes: dict[str, Any] = {
        "numerics": {"memory": "3MB", "microbatch": 2},
        "requests": requests,
        "analyses": {"ledger": True},
    }
    monkeypatch.setattr(module, "choose_meeting", watched)
    FisherKernelRunner(run.plan(tmp_path / "out", **changes)).run()
    said = foretold(run, tmp_path, **changes).phases[-1].strategy
    assert [option.strategy for option in used] == [said]
    assert said.tile is not None  # a grant so small that E goes in parts


def test_a_grant_that_is_too_small_says_what_is_enough(run, tmp_path):
    with pytest.raises(BatchError, match=r"Give at least \d+ bytes"):
        foretold(run, tmp_path, numerics={"memory": 1000})
    done = CliRunner().invoke(app, ["estimate", str(written(run, tmp_path)), "--memory", "1000"])
    assert done.exit_code == 2
    assert "memory=1000 bytes is too small" in done.stderr


def test_what_a_function_makes_is_not_known(run, tmp_path):
    requests = [{"kind": "payload", "name": "made", "callback": "tests.study.conftest.made"}]
    with pytest.raises(PlanError, match=r"made is made by tests\.study\.conftest\.made"):
        foretold(run, tmp_path, requests=requests)


def test_lengths_are_of_what_is_given_written_or_named(run, tmp_path):
    requests = [
        {"kind": "update", "name": "self"},
        {"kind": "from_file", "name": "some", "path": str(run.update), "sequence_ids": [run.batch.ids[0]]},
        {"kind": "custom_sequence", "name": "one", "prompt": "1+2=", "response": "33"},
        {"kind": "custom_prompts", "name": "two", "prompts": ["1+2=", "12+2="], "completions_per_prompt": 2},
    ]
    found = {phase.name: phase for phase in foretold(run, tmp_path, requests=requests).phases}
    sizes = {name.removeprefix("request "): (one.sequences, one.tokens) for name, one in found.items()}
    first = run.batch.records[0]
    assert sizes["self"] == sizes["gradients of U"]
    assert sizes["some"] == (1, len(first.prompt_ids) + len(first.response_ids))
    assert sizes["one"] == (1, 4 + 2 + 1)
    assert sizes["two"] == (4, 5 + 6)
