"""Studies of batches that trainers dumped: the recording's ω, and its step; what is lacking is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fkernel.checkpoint import load
from fkernel.cli import app
from fkernel.errors import FKernelError, PlanError
from fkernel.record import read
from fkernel.record.dumps import locate
from fkernel.rollout import GeneratedBatch, SampleGenerator, Sampling, jsonl, load_batch, save_batch
from fkernel.study import FisherKernelPlan, FisherKernelRunner, as_recorded
from fkernel.study.config.dump import TrainerDump
from fkernel.study.dumped import with_loss
from fkernel.study.lengths import lengths_of
from tests.checkpoint.writers import TOKENIZER
from tests.record import dumped
from tests.record.dumped import CHAT, TOKENS, Row
from tests.study.recorded_runs import PROBES
from tests.study.trl_run import LONGEST

STEP = 1
"""Optimizer steps that were taken before the step that is explained."""
OF_TRL: dict[str, Any] = {
    "loss": {"kind": "policy_gradient"},
    "weights": "dapo",
    "batch_size": 16,
    "mask_truncated": False,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> dumped.Trained:
    return dumped.trl(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def penalised(tmp_path_factory) -> dumped.Trained:
    """Two inner epochs, a penalty and an entropy bonus, at another temperature; truncated responses left out."""
    options: dict[str, Any] = {
        "loss_type": "grpo",
        "beta": 0.05,
        "num_iterations": 2,
        "entropy_coef": 0.01,
        "temperature": 0.8,
        "mask_truncated_completions": True,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "learning_rate": 2e-3,
        "max_steps": 2,
    }
    return dumped.trl(tmp_path_factory.mktemp("penalised"), **options)


def plan_of(run: dumped.Trained, out: Path, update: dict[str, Any], **more: Any) -> FisherKernelPlan:
    """A plan about a step of the run; keys of `more` are added to what is there."""
    samples = [{"prompt": row["prompt"], "response": row["response"], "raw": True} for row in PROBES]
    given: dict[str, Any] = {
        "checkpoint": {"path": str(run.output / f"checkpoint-{STEP}")},
        "update": {"kind": "trainer_dump", "path": str(run.output), "step": STEP + 1, **update},
        "sampling": {"temperature": 1.0, "max_new_tokens": LONGEST},
        "template": "bare",
        "step": {"max_norm": 0.3, "after": {"path": str(run.output / f"checkpoint-{STEP + 1}")}},
        "requests": [{"kind": "payload", "samples": samples, "name": "probes"}],
        "storage": {"persist": False, "pictures": False},
        "self_kernel": False,
        "out": str(out),
    }
    return FisherKernelPlan.model_validate({**given, **more})


def by_tokens(batch: GeneratedBatch) -> dict[Any, np.ndarray]:
    """{tokens of a sequence: its ω in all, η} added up over equal sequences, whose order no dump keeps."""
    sums: dict[Any, np.ndarray] = {}
    for record in batch:
        zeros = (0.0,) * len(record.response_ids)
        ω = np.sum([*record.token_weights.values(), zeros], axis=0)
        η = np.sum([*record.entropy_weights.values(), zeros], axis=0)
        key = record.prompt_ids, record.response_ids
        sums[key] = sums.get(key, 0) + np.stack([ω, η])
    return sums


def apart(ours: GeneratedBatch, theirs: GeneratedBatch) -> float:
    """The greatest difference of weights, as a share of the largest."""
    a, b = by_tokens(ours), by_tokens(theirs)
    assert a.keys() == b.keys()
    largest = max(float(np.abs(value).max()) for value in b.values())
    return max(float(np.abs(a[key] - b[key]).max()) for key in b) / largest


def weighed(runner: FisherKernelRunner) -> GeneratedBatch:
    with runner.prepare_update_workspace() as workspace:
        return workspace.batch


# ---------------------------------------------------------------------------------------------------------------- TRL


def test_trls_dump_explains_the_step_that_its_recording_explains(run, tmp_path):
    runner = FisherKernelRunner(plan_of(run, tmp_path / "dump", OF_TRL))
    recorded = plan_of(run, tmp_path / "recorded", {}).model_dump(include={"requests", "storage", "self_kernel"})
    place = {"recording": str(run.recording.directory), "step": STEP}
    other = FisherKernelPlan.model_validate(
        {
            "checkpoint": place,
            "update": {"kind": "recorded"},
            "template": "bare",
            "out": str(tmp_path / "r"),
            **recorded,
        }
    )
    ours, theirs = runner.run(), FisherKernelRunner(other).run()
    assert runner.workspace is not None
    assert apart(runner.workspace.batch, run.recording.step(STEP).batch) < 1e-6
    assert ours.step["audit"]["fine"], ours.step["audit"]
    assert ours.step["clip"] == pytest.approx(run.recording.step(STEP).clip, rel=1e-5)
    np.testing.assert_allclose(ours["probes"].predicted, theirs["probes"].predicted, rtol=1e-5, atol=1e-7)
    assert ours["probes"].realised is not None
    assert ours["probes"].unexplained is not None
    moved = float(np.linalg.norm(ours["probes"].realised))
    assert float(np.linalg.norm(ours["probes"].predicted - ours["probes"].realised)) < 0.05 * moved
    assert float(np.linalg.norm(ours["probes"].unexplained)) < 1e-3 * moved


@pytest.mark.parametrize("step", [0, 1])
def test_a_later_step_on_the_same_batch_with_a_penalty_and_an_entropy_bonus(penalised, tmp_path, step):
    """ω and η are the recording's: of TRL's loss, which the plan names by TRL's own settings."""
    base = {"path": str(penalised.output.parent / "base")}
    theirs = penalised.recording.step(step).batch
    tokens = sum(len(record.response_ids) for record in theirs)
    loss = {
        "kind": "clipped_ratio",
        "old": base,
        "kl": {"beta": 0.05, "reference": base},
        "entropy": {"coefficient": 0.01, "weight": 1 / tokens},
    }
    plan = plan_of(
        penalised,
        tmp_path,
        {"step": step + 1, "loss": loss, "weights": "grpo", "batch_size": 16, "mask_truncated": True},
        checkpoint=base if step == 0 else {"path": str(penalised.output / "checkpoint-1")},
        sampling={"temperature": 0.8, "max_new_tokens": LONGEST},
        step={"optimizer": {"kind": "adamw", "lr": 2e-3}} if step == 0 else {},
        requests=(),
    )
    ours = weighed(FisherKernelRunner(plan))
    assert {*ours.token_weights} == ({"advantage", "kl"} if step else {"advantage"})
    assert {*ours.entropy_weights} == {"entropy"}
    assert apart(ours, theirs) < 1e-4
    assert all(record.finish == "eos" for record in ours)


def test_without_a_loss_of_its_own_nothing_is_filled_in(run, tmp_path):
    plan = as_recorded(plan_of(run, tmp_path, OF_TRL))
    assert plan.step.loss is not None
    assert plan.step.loss.kind == "token_weights"
    assert isinstance(plan.update, TrainerDump)
    assert (plan.update.step, plan.update.trainer) == (STEP + 1, "trl")
    assert as_recorded(plan) == plan
    lengths, assumed = lengths_of(plan.model_copy(update={"requests": ()}), load(run.output / f"checkpoint-{STEP}"))
    assert len(lengths["U"]) == 16
    assert not assumed


# -------------------------------------------------------------------------- the same step, as other trainers write it


def rows_of(run: dumped.Trained) -> list[Row]:
    """The recorded step's sequences, with what other trainers would have of them."""
    groups: dict[Any, int] = {}
    rows = []
    for record in sorted(run.recording.step(STEP).batch, key=lambda record: record.prompt_ids):
        t = len(record.response_ids)
        assert record.advantage is not None
        rows.append(
            Row(
                [*record.prompt_ids],
                [*record.response_ids],
                groups.setdefault(record.prompt_ids, len(groups)),
                [record.advantage] * t,
                [1] * t,
                [*record.logprobs],
                [*record.logprobs],
                [*record.logprobs],
                record.reward or 0.0,
            )
        )
    return rows


WRITTEN: dict[str, tuple[int, dict[str, Any]]] = {
    "nemo_rl": (STEP + 1, {"loss": {"kind": "clipped_ratio"}, "weights": "dapo", "batch_size": 16}),
    "prime_rl": (STEP + 1, {"loss": {"kind": "dppo"}}),
    "open_instruct": (STEP, {"loss": {"kind": "policy_gradient"}, "weights": "dapo", "batch_size": 16}),
    "slime": (STEP, {"loss": {"kind": "clipped_ratio"}, "weights": "dapo"}),
}


@pytest.mark.parametrize("name", TOKENS)
def test_the_same_step_as_another_trainer_writes_it(run, tmp_path, name):
    number, update = WRITTEN[name]
    path = TOKENS[name](tmp_path / "dump", number, rows_of(run))
    plan = plan_of(run, tmp_path / "out", {"path": str(path), "step": number, **update})
    runner = FisherKernelRunner(plan)
    results = runner.run()
    assert results.step["audit"]["fine"], results.step["audit"]
    assert runner.workspace is not None
    assert apart(runner.workspace.batch, run.recording.step(STEP).batch) < 1e-5


def test_verls_texts_and_scores(run, tmp_path, monkeypatch):
    """Advantages by the plan's rule, with verl's ε; prompts looked up in the plan's, in the chat template."""
    rows = rows_of(run)
    file = tmp_path / "prompts.jsonl"
    prompts = sorted({str(TOKENIZER.decode(row.prompt)) for row in rows})
    file.write_text("\n".join(f'{{"question": "{prompt[:-1]}", "answer": ""}}' for prompt in prompts))
    path = dumped.verl(tmp_path / "dump", STEP + 1, rows)
    update = {"path": str(path), "advantage": "grpo", "weights": "dapo", "batch_size": 16, "loss": OF_TRL["loss"]}
    loaded = load(run.output / f"checkpoint-{STEP}")
    loaded.tokenizer.chat_template = CHAT
    generator = SampleGenerator(
        loaded.model, loaded.tokenizer, jsonl(file), sampling=Sampling(max_new_tokens=LONGEST), template="chat"
    )
    dump = TrainerDump.model_validate({"kind": "trainer_dump", "step": STEP + 1, "trainer": "verl", **update})
    batch = dump.generate(generator)
    rewards = torch.tensor([row.reward for row in rows]).reshape(4, 4)
    A = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    assert batch.advantages.tolist() == pytest.approx(A.flatten().tolist(), rel=1e-5)
    total = sum(len(row.response) for row in rows)
    for record, row, advantage in zip(batch, rows, A.flatten().tolist(), strict=True):
        assert record.prompt_ids == tuple(row.prompt)
        assert record.response_ids == tuple(row.response)
        assert record.token_weights["advantage"] == pytest.approx([-advantage / total] * len(row.response))


# ------------------------------------------------------------------------------------------------- what is asked for

KEYS: dict[str, set[str]] = {
    "trl": {
        *("update.loss", "update.weights", "update.batch_size", "update.mask_truncated"),
        *("sampling.temperature", "sampling.max_new_tokens"),
    },
    "nemo_rl": {"update.loss", "update.weights", "update.batch_size", "sampling.temperature"},
    "prime_rl": {"update.loss", "sampling.temperature"},
    "open_instruct": {"update.loss", "update.weights", "update.batch_size", "sampling.temperature"},
    "slime": {"update.loss", "update.weights", "sampling.temperature"},
    "verl": {
        *("update.loss", "update.weights", "update.batch_size", "update.advantage"),
        *("sampling.temperature", "sampling.max_new_tokens", "prompts"),
    },
}


@pytest.mark.parametrize("name", KEYS)
def test_what_a_dump_lacks_is_asked_for_at_once(run, tmp_path, name):
    rows = rows_of(run)
    writers = {**TOKENS, "verl": dumped.verl, "trl": lambda *_: run.output}
    path = writers[name](tmp_path / "dump", STEP + 1, rows)
    plan = plan_of(run, tmp_path, {"path": str(path)}).model_dump(exclude={"sampling"})
    with pytest.raises(PlanError) as raised:
        as_recorded(FisherKernelPlan.model_validate(plan))
    lines = str(raised.value).splitlines()[1:]
    assert {line.strip().split(": ")[0] for line in lines} == KEYS[name]
    ratios = "old: {path: the checkpoint before the first step on this batch}" in str(raised.value)
    assert ratios == ("old" in locate(path, STEP + 1).lacks)  # no second question after a loss with a ratio


def test_checking_a_plan_says_what_its_dump_lacks(run, tmp_path):
    plan = plan_of(run, tmp_path / "out", {}).model_dump(mode="json", include={"checkpoint", "update", "out"})
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan))
    result = CliRunner().invoke(app, ["plan", "check", str(file)])
    assert result.exit_code == 2
    assert "update.batch_size: sequences of one optimizer step" in result.output


def test_the_policy_of_a_ratio_is_asked_for(run, tmp_path):
    with pytest.raises(PlanError, match=r"update.loss.old: the checkpoint before the first step on this batch"):
        as_recorded(plan_of(run, tmp_path, {**OF_TRL, "loss": {"kind": "cispo", "cap": 5.0}}))
    path = dumped.nemo_rl(tmp_path, STEP + 1, [row._replace(trainer=[0.0] * len(row.trainer)) for row in rows_of(run)])
    update = {**WRITTEN["nemo_rl"][1], "path": str(path)}
    with pytest.raises(PlanError, match="clipped_ratio needs log-probabilities of the policy before the first step"):
        weighed(FisherKernelRunner(plan_of(run, tmp_path / "out", update)))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"mask_truncated": None}, r"update.mask_truncated: \d+ of 16 responses were cut off, U-"),
    ({"batch_size": 8}, r"update.batch_size is 8, and the dump has 16 sequences of step 2: several optimizer steps"),
    ({"batch_size": 32}, r"update.batch_size is 32, and the dump has 16 sequences of step 2: rows are missing"),
    ({"step": 3}, r"TRL's step 3 was taken after 2 optimizer steps, and the plan's checkpoint is after 1"),
    ({"step": 9}, r"holds no step 9; it holds 1, 2, 3"),
    ({"step": None}, r"holds the steps 1, 2, 3; say which"),
    ({"path": "nowhere"}, r"There is nothing at nowhere"),
    ({"weights": "bnpo"}, r"which micro-batch each was in is not in the dump"),
    ({"weight_options": {"accumulation": 2}}, r"which micro-batch each was in is not in the dump"),
    ({"advantage": "grpo"}, r"update.advantage: the dump has advantages; leave the rule out"),
    ({"loss": {"kind": "policy_gradient", "correction": {}}}, r"needs log-probabilities of the sampling engine"),
    ({"loss": {"kind": "dppo"}}, r"the ratio of dppo is to the sampling engine, and the dump has no"),
]


@pytest.mark.parametrize(("change", "said"), WRONG)
def test_what_does_not_fit_is_said(run, tmp_path, change, said):
    with pytest.raises(FKernelError, match=said):
        weighed(FisherKernelRunner(plan_of(run, tmp_path, {**OF_TRL, **change})))


def test_a_loss_is_named_in_one_place(run, tmp_path):
    step = {"loss": {"kind": "clipped_ratio"}}
    with pytest.raises(PlanError, match=r"step.loss: the token weights of a dumped batch are made of update.loss"):
        as_recorded(plan_of(run, tmp_path, OF_TRL, step=step))
    both = {"loss": {"kind": "clipped_ratio", "old": {"path": "x"}}, "old": "sampler"}
    with pytest.raises(ValueError, match=r"old and loss\.old name the policy of the ratio in two ways"):
        plan_of(run, tmp_path, both)
    with pytest.raises(ValueError, match="policy_gradient has no ratio"):
        plan_of(run, tmp_path, {"loss": {"kind": "policy_gradient", "old": {"path": "x"}}})
    with pytest.raises(ValueError, match="prime-rl's losses have no entropy"):
        plan_of(run, tmp_path, {"loss": {"kind": "dppo", "entropy": {"coefficient": 0.1}}})


def test_the_batch_of_a_dump_is_one_that_a_study_can_save(run, tmp_path):
    loaded = load(run.output / f"checkpoint-{STEP}")
    policy = SampleGenerator(loaded.model, loaded.tokenizer, sampling=Sampling(), template="bare")
    batch = read(run.output, STEP + 1, tokenizer=TOKENIZER, max_new_tokens=LONGEST)
    update = TrainerDump.model_validate({"kind": "trainer_dump", "path": "x", "step": 2, "trainer": "trl", **OF_TRL})
    made = with_loss(batch, update, policy)
    assert load_batch(save_batch(made, tmp_path / "batch")) == made
