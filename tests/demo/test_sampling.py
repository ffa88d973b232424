"""Samples are the same for a seed, disturb nobody, and end with the EOS that ended them."""

import pytest
import torch
from transformers import Qwen2ForCausalLM

from fkernel.demo.policy import PolicyConfig, build_model
from fkernel.demo.sampling import Sample, accuracy, sample
from fkernel.demo.score import sequence_logprob, tokens
from fkernel.demo.task import TaskConfig, splits
from fkernel.demo.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
PROBLEMS = splits(TaskConfig())[0][:6]


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    return build_model(PolicyConfig(layers=1, width=16, heads=2, mlp=16), TOKENIZER)


def draw(model: Qwen2ForCausalLM, seed: int = 0, completions: int = 20, max_new_tokens: int = 5) -> list[Sample]:
    return sample(model, TOKENIZER, PROBLEMS, completions, 1.0, max_new_tokens, seed, "U", batch_size=50)


def test_a_seed_decides_the_samples(model: Qwen2ForCausalLM) -> None:
    assert draw(model) == draw(model)
    assert draw(model) != draw(model, seed=1)


def test_the_callers_random_state_and_the_models_mode_are_untouched(model: Qwen2ForCausalLM) -> None:
    model.train()
    before = torch.get_rng_state()
    draw(model)
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
    model.eval()


def test_the_callers_random_state_does_not_matter(model: Qwen2ForCausalLM) -> None:
    first = draw(model)
    torch.rand(7)
    assert draw(model) == first


def test_ids_name_group_and_completion(model: Qwen2ForCausalLM) -> None:
    samples = draw(model)
    assert len(samples) == 120
    assert (samples[0].id, samples[23].id) == ("U-000-00", "U-001-03")
    assert samples[23].group == 1
    assert samples[23].problem == PROBLEMS[1]
    assert len({s.id for s in samples}) == 120


def test_eos_is_the_last_token_of_a_response_and_nowhere_else(model: Qwen2ForCausalLM) -> None:
    samples = draw(model)
    ended = [s for s in samples if not s.truncated]
    truncated = [s for s in samples if s.truncated]
    assert ended
    assert truncated
    for s in ended:
        assert s.response_ids[-1] == 1
        assert 1 not in s.response_ids[:-1]
        assert "<eos>" not in s.text
    for s in truncated:
        assert len(s.response_ids) == 5
        assert 1 not in s.response_ids


def test_a_truncated_answer_earns_nothing(model: Qwen2ForCausalLM) -> None:
    for s in draw(model, completions=200, max_new_tokens=2):
        assert s.reward == float(not s.truncated and s.text == s.problem.answer)


def test_what_is_scored_is_what_was_sampled(model: Qwen2ForCausalLM) -> None:
    """Every first token gets sampled as often as exp S says; a hidden top-k or top-p would break that."""
    n = 4000
    samples = sample(model, TOKENIZER, PROBLEMS[:1], n, 1.0, 1, 0, batch_size=n)
    one_each = {s.response_ids: s for s in samples}
    assert len(one_each) == 15
    with torch.no_grad():
        expected = sequence_logprob(model, tokens(list(one_each.values()), 0), 1.0).exp()
    counts = torch.tensor([sum(s.response_ids == r for s in samples) for r in one_each])
    assert expected.sum().item() == pytest.approx(1.0, abs=1e-5)
    z = (counts - n * expected) / (n * expected * (1 - expected)).sqrt()
    assert z.abs().max() < 4.5


def test_masks_cover_prompt_response_and_eos() -> None:
    problem = PROBLEMS[0]
    pair = [
        Sample("U-000-00", 0, problem, (2, 3), (4, 1), "2", False, 0.0),
        Sample("U-000-01", 0, problem, (2, 3), (4, 5, 6), "234", True, 0.0),
    ]
    batch = tokens(pair, pad=0)
    assert batch.input_ids.tolist() == [[2, 3, 4, 1, 0], [2, 3, 4, 5, 6]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert batch.response_mask.tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]


def test_accuracy_is_the_mean_reward(model: Qwen2ForCausalLM) -> None:
    samples = draw(model)
    assert accuracy(samples) == sum(s.reward for s in samples) / 120
