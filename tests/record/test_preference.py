"""TRL's DPOTrainer, recorded: both responses of a pair, their ω, and the reference's log-probabilities."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fkernel.errors import ModelError
from fkernel.record import Recorder
from tests.checkpoint.writers import TOKENIZER
from tests.record.trainers import SEEN, Run, answer, dpo

BETA = 0.3
CASES: dict[str, dict[str, Any]] = {
    "dpo": {},
    "adapter": {"lora": True},
    "reference beforehand": {"precompute_ref_log_probs": True},
    "ipo and sft, autocast": {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.5], "bf16": True},
    "lengths, checkpointed": {"ld_alpha": 0.5, "use_weighting": True, "gradient_checkpointing": True},
}


@pytest.fixture(scope="module", params=CASES)
def run(request, tmp_path_factory) -> Run:
    place = tmp_path_factory.mktemp("run")
    return Run(place, dpo(place, **{"beta": BETA, **CASES[request.param]}))


def test_the_trainers_gradient_is_met(run):
    assert run.recording.steps == (0, 1, 2)
    for number in run.recording.steps:
        step = run.recording.step(number)
        assert step.check is not None
        assert step.check["relative_error"] < 1e-6
        assert step.grad_norm == pytest.approx(run.log[number]["grad_norm"], rel=1e-5)
        assert step.clip == pytest.approx(min(1.0, 0.3 / (step.grad_norm + 1e-6)), rel=1e-5)
        assert step.loss == pytest.approx(run.log[number]["loss"], rel=1e-5)


def test_rows_are_both_responses_of_each_pair(run):
    for number in run.recording.steps:
        step = run.recording.step(number)
        assert len(step.microbatches) == 2
        for recorded, given in zip(step.microbatches, run.given[number], strict=True):
            assert torch.equal(recorded.input_ids, given["input_ids"])
            assert torch.equal(recorded.response_mask.long(), given["completion_mask"])
        assert len(step.rows) == 16
        for row, record in zip(step.rows, step.batch, strict=True):
            assert row["sequence_id"] == f"U-{row['pair']:03d}-{0 if row['chosen'] else 1:02d}"
            assert record.prompt in SEEN
            expected = answer(record.prompt) if row["chosen"] else f"{answer(record.prompt)[::-1]}0"
            assert record.response == expected
        pairs = {}
        for row, record in zip(step.rows, step.batch, strict=True):
            pairs.setdefault(row["pair"], []).append(record.prompt)
        assert sorted(pairs) == [*range(8)]
        assert all(len(prompts) == 2 and len({*prompts}) == 1 for prompts in pairs.values())


def test_token_weights_are_autograds(run):
    for number in run.recording.steps:
        step = run.recording.step(number)
        policies = [each for each in run.weights[number] if each[1] is not None]
        for recorded, (log_p, g) in zip(step.microbatches, policies, strict=True):
            mask = recorded.response_mask[:, 1:]
            assert torch.equal(recorded.token_weights[:, 1:], g * mask)
            assert torch.equal(recorded.logprobs[:, 1:], log_p)


def test_the_references_log_probabilities_are_kept(run):
    step = run.recording.step(0)  # before a step the policy is its reference
    tolerance = 0.02 if run.trainer.args.bf16 else 1e-5
    for i, each in enumerate(step.microbatches):
        rows = [row for row in step.rows if row["microbatch"] == i]
        summed = (each.logprobs * each.response_mask).sum(1).tolist()
        assert [row["reference_logprob"] for row in rows] == pytest.approx(summed, rel=tolerance)
        if not run.trainer.precompute_ref_logps:
            assert torch.allclose(each.others["reference_logprobs"], each.logprobs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("lora", [False, True])
def test_the_weights_are_those_of_dpo(tmp_path, lora):
    """ω_t = ∓ β σ(−β Δ) / pairs, the same for every token of a response; Δ from what the record holds."""
    run = Run(tmp_path, dpo(tmp_path, lora, beta=BETA))
    for number in run.recording.steps:
        step = run.recording.step(number)
        for i, each in enumerate(step.microbatches):
            rows, n = [row for row in step.rows if row["microbatch"] == i], len(each) // 2
            reference = torch.tensor([row["reference_logprob"] for row in rows])
            ratios = (each.logprobs * each.response_mask).sum(1) - reference
            size = BETA * torch.sigmoid(-BETA * (ratios[:n] - ratios[n:])) / n / 2  # two micro-batches a step
            expected = torch.cat([-size, size])[:, None] * each.response_mask
            assert torch.allclose(each.token_weights, expected, rtol=1e-4)


@pytest.mark.turns(6)
def test_a_run_that_is_resumed_is_compared(tmp_path):
    Run(tmp_path, dpo(tmp_path, lora=True))
    place = tmp_path / "recording" / "steps" / "000002" / "step.json"
    before = place.stat().st_mtime_ns
    again = dpo(tmp_path, lora=True)
    Recorder(tmp_path / "recording", snapshots="every").attach(again)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert place.stat().st_mtime_ns == before
    assert not (tmp_path / "recording" / "replaced").exists()


class DPOTrainer:
    """Of an older TRL, whose log-probabilities are computed from logits within the loss."""

    model, args, accelerator = None, SimpleNamespace(), SimpleNamespace()
    processing_class = TOKENIZER

    def compute_loss(self) -> None:
        raise AssertionError

    training_step = add_callback = compute_loss


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"use_liger_kernel": True}, "use_liger_kernel=False"),
        ({"padding_free": True}, "padding_free=False"),
        ({}, "TRL 1.16 has one that returns them"),
    ],
)
def test_what_attach_refuses(tmp_path, option, said):
    trainer = DPOTrainer()
    trainer.args = SimpleNamespace(**option)
    with Recorder(tmp_path) as recorder, pytest.raises(ModelError, match=said):
        recorder.attach(trainer)
