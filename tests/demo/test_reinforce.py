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
from fkernel.demo.records import Record, read_records
from fkernel.demo.reinforce import advantages, clip, reinforce
from fkernel.demo.task import splits
from fkernel.demo.tokenizer import build_tokenizer
from fkernel.rollout import load_batch


def load(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()


def restored_optimizer(model: torch.nn.Module, path: Path) -> torch.optim.AdamW:
    state = torch.load(path, weights_only=True)
    optimizer = torch.optim.AdamW(model.named_parameters())
    optimizer.load_state_dict(state)
    return optimizer


def one_sequence_logprob(model: PreTrainedModel, record: Record) -> torch.Tensor:
    """S of one sequence alone, unpadded: shares nothing with the batched code under test."""
    prompt, response = record.sample.prompt_ids, record.sample.response_ids
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
    logp = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return sum((logp[i, token] for i, token in enumerate(response)), torch.tensor(0.0))


def test_the_saved_step_reproduces_the_model_after_it(prepared: Path) -> None:
    model, after = load(prepared / "model"), load(prepared / "after" / "model")
    step = json.loads((prepared / "step.json").read_text())
    optimizer = restored_optimizer(model, prepared / "optimizer.pt")
    for record in read_records(prepared / "update.json"):
        (-record.weight * record.advantage * one_sequence_logprob(model, record)).backward()
    norm, factor = clip(model, step["max_norm"])
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


def test_update_records_hold_advantages_and_weights(prepared: Path, tiny: DemoConfig) -> None:
    records = read_records(prepared / "update.json")
    n = tiny.reinforce.prompts * tiny.reinforce.completions
    assert [r.sample.id for r in records][:3] == ["U-000-00", "U-000-01", "U-000-02"]
    assert len(records) == n
    assert {r.weight for r in records} == {1 / n}
    expected = advantages(torch.tensor([r.sample.reward for r in records]), tiny.reinforce.completions)
    assert [r.advantage for r in records] == expected.tolist()
    assert any(r.advantage for r in records)


def test_prompts_are_split_and_the_update_batch_is_of_those_trained_on(prepared: Path, tiny: DemoConfig) -> None:
    train, held_out = splits(tiny.task)
    questions = {
        split: [json.loads(line)["question"] for line in (prepared / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "test")
    }
    assert questions == {"train": [p.prompt for p in train], "test": [p.prompt for p in held_out]}
    batch = load_batch(prepared / "update", checkpoint=checkpoint.load(prepared).provenance.fingerprint)
    for record, saved in zip(read_records(prepared / "update.json"), batch, strict=True):
        assert (saved.sequence_id, saved.response_ids) == (record.sample.id, record.sample.response_ids)
        assert (saved.reward, saved.advantage, saved.weight) == (record.sample.reward, record.advantage, record.weight)
        place = int(saved.provenance.global_prompt_id.removeprefix("train-"))
        assert train[place] == record.sample.problem


def test_the_saved_tokenizer_reads_the_saved_prompts(prepared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(prepared / "model")
    for record in read_records(prepared / "update.json"):
        assert tuple(tokenizer(record.sample.problem.prompt).input_ids) == record.sample.prompt_ids


def test_step_json_tells_the_run(prepared: Path, tiny: DemoConfig) -> None:
    step = json.loads((prepared / "step.json").read_text())
    assert (step["steps_before"], step["step"], len(step["history"])) == (1, 2, 2)
    assert step["clip_factor"] == min(1.0, step["max_norm"] / (step["gradient_norm"] + 1e-6))
    assert step["gradient_norm"] > 0
    assert 0.0 <= step["accuracy_before_rl"] <= 1.0
    assert step["versions"]["torch"] == torch.__version__
    assert step["parameters"] > 1000


def test_advantages_sum_to_zero_in_every_group() -> None:
    a = advantages(torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0]), 3)
    assert a.tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3, 0, 0, 0])


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
    train, _ = splits(tiny.task)
    tokenizer = build_tokenizer()
    config = replace(tiny.reinforce, min_groups=5)
    with pytest.raises(RuntimeError, match="of 4 groups of the last batch hold both"):
        reinforce(build_model(tiny.policy, tokenizer), tokenizer, train, config, tmp_path)


def test_too_few_problems_are_refused(tmp_path: Path, tiny: DemoConfig) -> None:
    train, _ = splits(tiny.task)
    tokenizer = build_tokenizer()
    config = replace(tiny.reinforce, prompts=100)
    with pytest.raises(ValueError, match="need 200 training problems"):
        reinforce(build_model(tiny.policy, tokenizer), tokenizer, train, config, tmp_path)


@pytest.mark.parametrize("bad", [{"steps": 1}, {"completions": 1}])
def test_steps_without_meaning_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        ReinforceConfig(**bad)
