"""What is on disk IS the last step: recomputed with plain autograd, it lands where the run did."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fkernel import checkpoint
from fkernel.demo import DemoConfig, ReinforceConfig
from fkernel.demo.policy import build_model
from fkernel.demo.task import splits
from fkernel.demo.tokenizer import build_tokenizer
from fkernel.demo.training import clip, reinforce, sequence_logprob
from fkernel.errors import RolloutError
from fkernel.rollout import GeneratedBatch, SampleGenerator, Sampling, SequenceRecord, load_batch


def load(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def update(prepared: Path) -> GeneratedBatch:
    return load_batch(prepared / "update", checkpoint=checkpoint.load(prepared).provenance.fingerprint)


def policy(tiny: DemoConfig) -> SampleGenerator:
    tokenizer = build_tokenizer()
    model, sampling = build_model(tiny.policy, tokenizer), Sampling(max_new_tokens=5)
    return SampleGenerator(model, tokenizer, splits(tiny.task), sampling=sampling, template="bare")


def restored_optimizer(model: torch.nn.Module, path: Path) -> torch.optim.AdamW:
    state = torch.load(path, weights_only=True)
    optimizer = torch.optim.AdamW(model.named_parameters())
    optimizer.load_state_dict(state)
    return optimizer


def one_sequence_logprob(model: PreTrainedModel, record: SequenceRecord) -> torch.Tensor:
    """S of one sequence alone, unpadded: shares nothing with the batched code under test."""
    prompt, response = record.prompt_ids, record.response_ids
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
    logp = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return sum((logp[i, token] for i, token in enumerate(response)), torch.tensor(0.0))


def test_the_saved_step_reproduces_the_model_after_it(prepared: Path, update: GeneratedBatch) -> None:
    model, after = load(prepared / "model"), load(prepared / "after" / "model")
    step = json.loads((prepared / "step.json").read_text())
    optimizer = restored_optimizer(model, prepared / "optimizer.pt")
    for record in update:
        assert record.weight is not None
        assert record.advantage is not None
        (-record.weight * record.advantage * one_sequence_logprob(model, record)).backward()
    norm, factor = clip(model, step["config"]["reinforce"]["max_norm"])
    optimizer.step()
    assert norm == pytest.approx(step["gradient_norm"], rel=1e-4)
    assert factor == pytest.approx(step["clip_factor"], rel=1e-4)
    moved = load(prepared / "model").state_dict()
    for name, value in after.state_dict().items():
        assert torch.allclose(model.state_dict()[name], value, rtol=0, atol=1e-7), name
        assert not torch.equal(moved[name], value), f"{name} did not move"


def test_the_optimizer_names_its_parameters(prepared: Path) -> None:
    state = torch.load(prepared / "optimizer.pt", weights_only=True)
    (group,) = state["param_groups"]
    model = load(prepared / "model")
    assert group["param_names"] == [name for name, _ in model.named_parameters()]
    assert (group["lr"], group["weight_decay"]) == (1e-5, 0.01)
    assert {int(s["step"]) for s in state["state"].values()} == {1}


def test_the_loss_scores_what_one_sequence_alone_says(prepared: Path, update: GeneratedBatch) -> None:
    model = load(prepared / "model")
    with torch.no_grad():
        alone = torch.stack([one_sequence_logprob(model, record) for record in update])
        assert torch.allclose(sequence_logprob(model, update, 1.0), alone, rtol=0, atol=1e-5)


def test_the_update_batch_holds_rewards_advantages_and_weights(update: GeneratedBatch, tiny: DemoConfig) -> None:
    n, size = len(update), tiny.reinforce.completions
    assert n == tiny.reinforce.prompts * size
    assert update.ids[:3] == ["U-000-00", "U-000-01", "U-000-02"]
    assert {record.weight for record in update} == {1 / n}
    rewards = update.rewards.reshape(-1, size)
    assert torch.equal(update.advantages, (rewards - rewards.mean(1, keepdim=True)).flatten())
    assert update.advantages.any()


def test_prompts_are_split_and_the_update_batch_is_of_those_trained_on(
    prepared: Path, update: GeneratedBatch, tiny: DemoConfig
) -> None:
    prompts = splits(tiny.task)
    for split, source in prompts.items():
        lines = [json.loads(line) for line in (prepared / f"{split}.jsonl").read_text().splitlines()]
        assert lines == [{"question": each.question, "answer": each.answer} for each in source]
    for record in update:
        spec = prompts["train"][int(record.provenance.global_prompt_id.removeprefix("train-"))]
        assert record.prompt == spec.question
        assert record.reward == float(record.response == spec.answer)


def test_the_saved_tokenizer_reads_the_saved_prompts(prepared: Path, update: GeneratedBatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(prepared / "model")
    for record in update:
        assert tuple(tokenizer(record.prompt).input_ids) == record.prompt_ids


def test_step_json_tells_the_run(prepared: Path, tiny: DemoConfig) -> None:
    step = json.loads((prepared / "step.json").read_text())
    assert (step["steps_before"], step["step"], len(step["history"])) == (1, 2, 2)
    assert step["clip_factor"] == min(1.0, step["config"]["reinforce"]["max_norm"] / (step["gradient_norm"] + 1e-6))
    assert step["gradient_norm"] > 0
    assert 0.0 <= step["supervision"]["accuracy"] <= 1.0
    assert step["versions"]["torch"] == torch.__version__
    assert step["parameters"] > 1000


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_clip_reports_what_it_multiplied_with(scale: float) -> None:
    layer = torch.nn.Linear(3, 2, bias=False)
    gradient = torch.full((2, 3), scale)
    layer.weight.grad = gradient.clone()
    norm, factor = clip(layer, 1.0)
    assert norm == pytest.approx(scale * math.sqrt(6), rel=1e-6)
    assert (factor == 1.0) == (norm < 1)
    assert torch.allclose(layer.weight.grad, factor * gradient)


def test_a_batch_without_signal_is_refused(tmp_path: Path, tiny: DemoConfig) -> None:
    config = replace(tiny.reinforce, min_groups=5)
    with pytest.raises(RuntimeError, match="of 4 groups of the last batch hold both"):
        reinforce(policy(tiny), config, tmp_path)


def test_too_few_problems_are_refused(tmp_path: Path, tiny: DemoConfig) -> None:
    config = replace(tiny.reinforce, prompts=100)
    with pytest.raises(RolloutError, match="batch_size_prompts is 100; 'demo' has 14 prompts of 'train'"):
        reinforce(policy(tiny), config, tmp_path)


@pytest.mark.parametrize("bad", [{"steps": 1}, {"completions": 1}])
def test_steps_without_meaning_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        ReinforceConfig(**bad)
