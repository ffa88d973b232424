"""`fkernel sample PLAN`: from a file to a saved batch, on checkpoints as real trainers wrote them."""

from __future__ import annotations

import json

import pytest
import yaml
from typer.testing import CliRunner

import fkernel as fk
from fkernel import checkpoint
from fkernel.cli import app
from fkernel.rollout import load_batch
from fkernel.study import SamplePlan, read_plan
from tests.checkpoint.writers import grpo

PROMPTS = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(10, 13) for b in range(20, 22)]


@pytest.fixture(scope="module", params=["full", "lora"])
def run(request, tmp_path_factory):
    return grpo(tmp_path_factory.mktemp("run"), lora=request.param == "lora")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, PROMPTS)))
    return {"jsonl": str(path), "split": "train"}


def written(tmp_path, source, path, **changes):
    plan = {
        "checkpoint": {"path": str(path)},
        "prompts": [source],
        "template": "bare",
        "sampling": {"max_new_tokens": 5},
        "request": {"kind": "update", "batch_size_prompts": 3, "completions_per_prompt": 2, "reward": "exact"},
        "out": str(tmp_path / "U"),
    }
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump({**plan, **changes}))
    return str(file)


def test_a_trl_checkpoint_is_sampled_and_explained(run, tmp_path, prompts):
    result = CliRunner().invoke(app, ["sample", written(tmp_path, prompts, run.path)])
    assert result.exit_code == 0, result.output
    assert "6 of 6 sequences" in result.stdout
    assert "U-000-00" in result.stdout
    loaded = checkpoint.load(run.path)
    batch = load_batch(tmp_path / "U", checkpoint=loaded.provenance.fingerprint)
    apply, params = fk.func.make_functional(loaded.model)
    S = fk.func.sequence_logprob(apply)
    assert loaded.optimizer is not None
    effect, _ = fk.explain_step(
        S, params, batch.sequences, batch.sequences, batch.weighted_advantages, loaded.optimizer
    )
    assert effect.predicted.isfinite().all()
    for value, record in zip(S(params, batch.sequences).tolist(), batch, strict=True):
        assert value == pytest.approx(record.logprob, abs=1e-4)


def test_json_and_a_second_run_into_the_same_place(run, tmp_path, prompts):
    plan = written(tmp_path, prompts, run.path)
    first = CliRunner().invoke(app, ["sample", plan, "--json"])
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout)["sequences"] == 6
    again = CliRunner().invoke(app, ["sample", plan])
    assert again.exit_code == 2
    assert "something at" in again.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chekpoint": {}}, "chekpoint: there is no such key; did you mean 'checkpoint'?"),
        ({"sampling": {"temprature": 1}}, "sampling.temprature: there is no such key; did you mean 'temperature'?"),
        ({"sampling": {"temperature": 0}}, "sampling.temperature: expected greater than 0 (it is 0)"),
        ({"request": {"kind": "updates"}}, "request"),
        ({"request": {"kind": "update", "completions_per_prompt": 2}}, "batch_size_prompts: is missing"),
        (
            {"request": {"kind": "update", "batch_size_prompts": 3, "completions_per_prompts": 2}},
            "completions_per_prompts: there is no such key; did you mean 'completions_per_prompt'?",
        ),
        ({"prompts": [{"jsonl": "a", "task": "b"}]}, "give exactly one of jsonl, dataset and task, not jsonl and task"),
        ({"prompts": [{"jsonl": "a"}, {"jsonl": "b"}]}, "two prompt sources have the split 'train'"),
        ({"prompts": [{"jsonl": "nowhere.jsonl"}]}, "The prompts at nowhere.jsonl cannot be read"),
        ({"checkpoint": {"path": "nowhere"}}, "There is no checkpoint at nowhere"),
        ({"microbatch": "many"}, "microbatch: expected a valid integer"),
    ],
)
def test_mistakes_are_said_in_one_line(tmp_path, prompts, changes, message):
    result = CliRunner().invoke(app, ["sample", written(tmp_path, prompts, "nowhere", **changes)])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


def test_files_that_are_no_plans(tmp_path):
    file = tmp_path / "plan.yaml"
    for text, message in (("a: [1", "line 1, column"), ("- 1", "found a list"), ("", "found a NoneType")):
        file.write_text(text)
        with pytest.raises(fk.PlanError, match=message):
            read_plan(file, SamplePlan)
    with pytest.raises(fk.PlanError, match="There is no plan at"):
        read_plan(tmp_path / "nowhere.yaml", SamplePlan)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(fk.PlanError, match="no JSON"):
        read_plan(tmp_path / "plan.json", SamplePlan)
