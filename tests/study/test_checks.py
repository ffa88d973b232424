"""What can be found before anything is computed is found by `fkernel plan check`, and by `fkernel run` first."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import fkernel as fk
from fkernel.rollout import load_batch, save_batch
from fkernel.study import FisherKernelPlan, FisherKernelRunner, check_inputs
from fkernel.study import checks as checking
from tests.study.test_cli import told


def lines(plan) -> list[str]:
    with pytest.raises(fk.PlanError) as caught:
        check_inputs(FisherKernelPlan.model_validate(plan))
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"update": {"kind": "update", "batch_size_prompts": 2, "completions_per_prompt": 2, "reward": "no.such"}},
         "'no.such' is not a function that can be imported"),
        ({"requests": [{"kind": "payload", "callback": "json.nothing"}]}, "'json.nothing' is not a function"),
        ({"requests": [{"kind": "update", "advantages": "json.decoder"}]}, "it is a module"),
        ({"requests": [{"kind": "update", "advantages": {"U-009-00": 1.0}}]},
         "requests.0.advantages: 'U-009-00' names no sequence of U; it has 'U-000-00'"),
        ({"requests": [{"kind": "evaluation", "batch_size_prompts": 2, "sequence_ids": ["E-002-*"]}]},
         "requests.0.sequence_ids: 'E-002-*' names no sequence of this request; it has 'E-000-00', 'E-001-00'"),
        ({"requests": [{"kind": "payload", "samples": [{"name": "a", "prompt": "1", "response": "2"}],
                        "capture": {"pairs": [["b", "U-000-00"], ["a", "U-000-00"]]}}]},
         "requests.0.capture.pairs: 'b' names no sequence of the request; it has 'a'"),
        ({"analyses": {"counterfactuals": [{"name": "x", "flip": ["U-1*"]}]}},
         "analyses.counterfactuals.x.flip: 'U-1*' names no sequence of U"),
        ({"analyses": {"counterfactuals": [{"name": "x", "advantages": {"V": 1}}]}},
         "analyses.counterfactuals.x.advantages: 'V' names no sequence of U"),
        ({"capture": {"submatrices": [{"rows": ["*"], "columns": ["V-*"]}]}},
         "capture.submatrices.0.columns: 'V-*' names no sequence of U"),
        ({"template": "chat"}, "has no chat template; choose gsm8k_r1 or bare"),
        ({"checkpoint": {"path": "{before}", "optimizer": False}}, "has no optimizer state, and the preconditioner"),
        ({"update": {"kind": "from_file", "path": "{before}"}}, "update: There is no batch at"),
        ({"step": {"after": {"path": "{update}"}}}, "step.after.path: "),
        ({"numerics": {"device": "meta"}}, "numerics.device: 'meta' computes nothing here"),
        ({"numerics": {"device": "tpu"}}, "numerics.device: 'tpu' computes nothing here"),
    ],
)  # fmt: skip
def test_mistakes_are_found_without_a_gradient(run, tmp_path, changes, message):
    filled = json.loads(json.dumps(changes).replace("{before}", str(run.before)).replace("{update}", str(run.update)))
    found = lines({**run.plan(tmp_path / "out"), **filled})
    assert len(found) == 1, found
    assert message in found[0], found


def test_everything_is_said_at_once_and_nothing_is_computed(run, tmp_path):
    plan = run.plan(tmp_path / "out", template="chat", requests=[
        {"kind": "update", "advantages": {"V": 1.0}}, {"kind": "payload", "callback": "no.such"}])  # fmt: skip
    assert len(lines(plan)) == 3
    runner = FisherKernelRunner(plan)
    with pytest.raises(fk.PlanError):
        runner.run()
    assert "checkpoint" not in vars(runner)
    assert not (tmp_path / "out").exists()


def test_a_parent_folder_of_checkpoints_names_them(run, tmp_path):
    for step in (2, 10):
        shutil.copytree(run.before / "model", tmp_path / "run" / f"checkpoint-{step}")
    plan = run.plan(tmp_path / "out", checkpoint={"path": str(tmp_path / "run")})
    assert "holds 2 checkpoints, 'checkpoint-2', 'checkpoint-10'; name one, such as" in lines(plan)[0]
    shutil.copytree(run.before / "model", tmp_path / "run", dirs_exist_ok=True)  # as trainers leave the last weights
    assert "In it are 'checkpoint-2', 'checkpoint-10': name the one before the step." in lines(plan)[0]


@pytest.mark.turns(6)
def test_the_check_imports_no_model(run, tmp_path):
    """transformers' models take three seconds to import."""
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(run.plan(tmp_path / "out")))
    code = (
        "import sys; from fkernel.cli import app; app(['plan', 'check', sys.argv[1]], standalone_mode=False);"
        "print('transformers.modeling_utils' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "study.yaml")]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.endswith("False\n")


def test_tokens_beyond_the_vocabulary_are_found_in_saved_batches(run, tmp_path):
    batch = load_batch(run.update)
    first, *others = batch.records
    size = json.loads((run.before / "model" / "config.json").read_text())["vocab_size"]
    beyond = replace(first, response_ids=(*first.response_ids[:-1], size))
    save_batch(replace(batch, records=(beyond, *others)), tmp_path / "other")
    other = {"kind": "from_file", "path": str(tmp_path / "other")}
    found = lines(run.plan(tmp_path / "out", update=other, requests=[other]))
    of_other = f"{first.sequence_id} has the token {size}, and the checkpoint's vocabulary ends before {size}"
    assert [line.partition(";")[0] for line in found] == [f"update: {of_other}", f"requests.0: {of_other}"]


def test_packages_are_looked_for(run, tmp_path, monkeypatch):
    monkeypatch.setattr(checking, "find_spec", lambda name: None if name == "reasoning_gym" else find_spec(name))
    plan = run.plan(tmp_path / "out")
    plan["prompts"] = [*plan["prompts"], {"task": "gsm_symbolic", "split": "other"}]
    (line,) = lines(plan)
    assert line == "prompts.2.task: needs reasoning-gym, which is not installed: pip install 'fkernel[rollout]'."


def test_functions_of_the_working_directory_are_found(run, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def short(prompt, response): return -len(response)\n")
    draw = {"kind": "update", "batch_size_prompts": 2, "completions_per_prompt": 2, "reward": "my_rewards.short"}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(run.plan(tmp_path / "out", update=draw)))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    assert "is a plan" in told("plan", "check", "study.yaml").stdout


def test_the_check_takes_no_three_seconds_and_sees_another_plans_results(run, tmp_path):
    plan = run.plan(tmp_path / "out")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(plan))
    start = time.process_time()
    told("plan", "check", tmp_path / "study.yaml")
    assert time.process_time() - start < 3
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "environment.json").write_text('{"plan_hash": "another"}')
    assert "holds results of another plan" in told("plan", "check", tmp_path / "study.yaml", code=2).stderr
