"""The hub: batches with ids, provenance, rewards, advantages and statistics that are the policy's."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch

import fkernel as fk
from fkernel import func
from fkernel.rollout import CustomSample, Gym, Prompt, SampleGenerator, Sampling, TablePrompts, rewards
from fkernel.rollout.template import gsm8k_r1
from tests.rollout.conftest import byte_tokenizer, policy

ROWS = [{"question": f"{a}+{a}?", "answer": str(2 * a), "level": a} for a in range(12)]
SAMPLING = Sampling(max_new_tokens=8)


def generator(model, tokenizer, **options) -> SampleGenerator:
    sources = {split: TablePrompts("mine", split, ROWS) for split in ("train", "test")}
    return SampleGenerator(
        model,
        tokenizer,
        **{"prompts": sources, "sampling": SAMPLING, "template": "bare", "fingerprint": "f", **options},
    )


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fk.RolloutWarning)
        yield


def evens(prompt, response):
    return float(len(response) % 2)


def test_update_batch(model, tokenizer):
    batch = generator(model, tokenizer).generate_update_batch(4, 3, seed=5, reward_cfg=evens, advantage_cfg="rloo")
    assert batch.ids[:4] == ["U-000-00", "U-000-01", "U-000-02", "U-001-00"]
    assert len({r.provenance.global_prompt_id for r in batch}) == 4
    assert all(r.provenance.global_prompt_id.startswith("train-0000") for r in batch)
    assert {r.provenance.seed for r in batch} == {5}
    assert batch.checkpoint == "f"
    torch.testing.assert_close(batch.advantages, batch.with_advantages("rloo").advantages)
    torch.testing.assert_close(batch.weighted_advantages, batch.advantages / 12)
    first = batch.by_id("U-000-00")
    assert tokenizer.decode(list(first.prompt_ids)) == first.prompt
    assert len({r.response_ids for r in batch.by_prompt(first.provenance.global_prompt_id)}) > 1


def test_seeds_cover_prompts_and_completions(model, tokenizer):
    hub = generator(model, tokenizer)
    torch.manual_seed(1)
    first = hub.generate_update_batch(3, 2, seed=1, reward_cfg=None)
    torch.manual_seed(2)
    assert (
        generator(model, tokenizer, microbatch=1).generate_update_batch(3, 2, seed=1, reward_cfg=None).ids == first.ids
    )
    again = generator(model, tokenizer, microbatch=1).generate_update_batch(3, 2, seed=1, reward_cfg=None)
    assert [r.content_hash for r in again] == [r.content_hash for r in first]
    other = hub.generate_update_batch(3, 2, seed=2, reward_cfg=None)
    assert [r.provenance.global_prompt_id for r in other] != [r.provenance.global_prompt_id for r in first]


def test_completions_of_a_prompt_are_drawn_apart(model, tokenizer):
    batch = generator(model, tokenizer).generate_update_batch(3, 4, seed=1, reward_cfg=None)
    for group in range(3):
        said = {record.response_ids for record in batch if record.provenance.group == group}
        assert len(said) > 1


def test_evaluation_batch_draws_with_replacement(model, tokenizer):
    batch = generator(model, tokenizer).generate_evaluation_batch(40, seed=0)
    assert batch.ids[3] == "E-003-00"
    assert len({r.provenance.global_prompt_id for r in batch}) < 40
    twice = [batch.by_prompt(r.provenance.global_prompt_id) for r in batch]
    assert any(len({one.response_ids for one in each}) > 1 for each in twice)
    with pytest.raises(fk.RolloutError, match="batch_size_prompts is 40; 'mine' has 12 prompts of 'test'"):
        generator(model, tokenizer).generate_evaluation_batch(40, with_replacement=False)


def test_prompt_ids(model, tokenizer):
    hub = generator(model, tokenizer)
    batch = hub.generate_from_prompt_ids(["test-000007", 2], completions_per_prompt=2)
    assert [r.provenance.global_prompt_id for r in batch] == ["test-000007"] * 2 + ["test-000002"] * 2
    for wrong in ("test-000012", "train-000001", "seven"):
        with pytest.raises(fk.RolloutError, match="ids run from test-000000 to test-000011"):
            hub.generate_from_prompt_ids([wrong])


def test_custom_prompts_are_marked(model, tokenizer):
    batch = generator(model, tokenizer, prompts=None).generate_from_custom_prompts(["Why?", "How?"])
    assert batch.ids == ["C-000-00", "C-001-00"]
    assert all(r.provenance.custom and r.provenance.split == "custom" for r in batch)


def test_custom_sequence_is_scored_word_for_word(model, tokenizer):
    hub = generator(model, tokenizer)
    batch = hub.build_custom_sequence("1+1?", "3", {"why": "a wrong answer"})
    (record,) = batch
    assert record.response_ids == (*tokenizer.encode("3"), tokenizer.eos_token_id)
    assert record.finish == "given"
    assert record.provenance.custom
    assert record.metadata == {"why": "a wrong answer"}
    apply, params = func.make_functional(model)
    S = float(func.sequence_logprob(apply)(params, batch.sequences))
    assert record.logprob == pytest.approx(S, abs=1e-4)
    open_end = hub.build_custom_sequence(CustomSample("1+1?", "3", ended=False))
    assert open_end.records[0].response_ids == tuple(tokenizer.encode("3"))
    assert open_end.ids != batch.ids
    merged = batch.merge([batch, open_end, hub.build_custom_sequence("1+1?", "4")])
    assert len(merged) == 3


def test_gsm8k_template_is_what_is_read(model, tokenizer):
    hub = generator(model, tokenizer, template="gsm8k_r1")
    (record,) = hub.build_custom_sequence("1+1?", "2 </think> <answer> 2 </answer>")
    assert record.prompt == gsm8k_r1(Prompt("x", "1+1?"))
    assert record.prompt.endswith("Question: 1+1?\nResponse: <think>")
    assert "<answer> answer here </answer>" in record.prompt
    (raw,) = hub.build_custom_sequence("1+1?", "2", raw=True)
    assert raw.prompt == "1+1?"


def test_chat_template(model):
    tokenizer = byte_tokenizer(bos_token="<bos>")
    with pytest.raises(fk.RolloutError, match="has no chat template"):
        generator(model, tokenizer, template="chat")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    (record,) = generator(model, tokenizer, template="chat").build_custom_sequence("Hi", "Yo")
    assert record.prompt == "<bos>[Hi]>"
    assert record.prompt_ids.count(2) == 1


def test_reasoning_gym_end_to_end(model, tokenizer):
    source = Gym("basic_arithmetic", split="test", size=30, seed=3)
    hub = generator(model, tokenizer, prompts=source, template="gsm8k_r1")
    batch = hub.generate_evaluation_batch(6, dataset_split="test", reward_cfg="gym")
    assert all(r.provenance.source == "basic_arithmetic" for r in batch)
    assert batch.diagnostics["mean_reward"] == batch.rewards.mean().item()
    score = rewards.gym(source)
    assert score(source[0], f"I see. <answer>{source[0].answer}</answer>") == 1.0
    scored = score(source[0], "I do not know")
    assert scored is not None
    assert scored < 0.5


def test_gsm_symbolic_has_questions_of_gsm8ks_kind():
    source = Gym("gsm_symbolic", size=3)
    again, other = Gym("gsm_symbolic", size=3)[1], Gym("gsm_symbolic", split="test", size=3)[1]
    assert source[1] == again
    assert source[1].question != other.question
    assert rewards.math(source[1], f"<answer>{source[1].answer}</answer>") == 1.0
    assert rewards.math(source[1], f"<answer>{source[1].answer}1</answer>") == 0.0


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("<answer> 42 </answer>", 1.0),
        ("<answer>42.0</answer>", 1.0),
        (r"<answer>\frac{84}{2}</answer>", 1.0),
        ("<answer>41</answer>", 0.0),
        ("42", 0.0),
        ("<answer>42</answer><answer>42</answer>", 0.0),
        ("<answer>42", 0.0),
        ("<answer><answer>42</answer>", 0.0),
    ],
)
def test_math_wants_exactly_one_answer(response, reward):
    assert rewards.math(Prompt("x", "?", "so it is 6*7\n#### 42"), response) == reward


def test_rewards_by_name():
    found = rewards.reward_of("tests.rollout.test_generator.evens")
    assert found is not None
    assert found(Prompt("x", "?"), "abc") == 1.0
    for wrong in ("nonsense", "tests.rollout.nowhere", "math.pi"):
        with pytest.raises(fk.RolloutError, match=r"is not a reward: math, exact, gym, or module.function"):
            rewards.reward_of(wrong)
    with pytest.raises(fk.RolloutError, match="has no reference answer"):
        rewards.exact(Prompt("x", "?"), "1")
    with pytest.raises(fk.RolloutError, match="the prompts come from 'mine'"):
        rewards.gym(TablePrompts("mine", "test", ROWS))


def test_prompts_from_files(tmp_path):
    from datasets import Dataset, DatasetDict

    from fkernel.rollout import dataset, jsonl

    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    source = jsonl(path, "train")
    assert len(source) == 12
    assert source[3].global_prompt_id == "train-000003"
    assert source[3].metadata == {"level": 3}
    DatasetDict({"test": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "set")
    found = dataset(tmp_path / "set", "test")
    assert (found[3].question, found[3].answer) == (source[3].question, source[3].answer)
    with pytest.raises(fk.RolloutError, match=r"has the splits \['test'\]; there is no 'train'"):
        dataset(tmp_path / "set", "train")
    with pytest.raises(fk.RolloutError, match="There is no data set at"):
        dataset(tmp_path / "nowhere")
    with pytest.raises(fk.RolloutError, match=r"Row 0 .* has no text under 'ask'"):
        _ = jsonl(path, question="ask")[0]
    path.write_text('{"question": "a"}\n[1]\n')
    with pytest.raises(fk.RolloutError, match="line 2: expected an object"):
        jsonl(path)
    path.write_text('{"question": \n')
    with pytest.raises(fk.RolloutError, match="line 1: no JSON"):
        jsonl(path)
    with pytest.raises(fk.RolloutError, match="cannot be read"):
        jsonl(tmp_path / "nowhere.jsonl")
    with pytest.raises(fk.RolloutError, match="reasoning-gym makes no 'nonsense'"):
        Gym("nonsense")


class TestGuards:
    """Each is tripped by what it guards against."""

    def test_log_probabilities_of_another_policy(self, model, tokenizer, monkeypatch):
        from fkernel.rollout import generator as module

        other = policy(seed=1)
        score = module.score
        monkeypatch.setattr(module, "score", lambda _, *rest: score(other, *rest))
        with pytest.raises(fk.RolloutError, match=r"U-000-00: log π of token \d+ was .* at sampling and is"):
            generator(model, tokenizer).generate_update_batch(2, 2, reward_cfg=None)

    def test_nan_is_no_agreement(self):
        from fkernel.rollout import check_recorded

        with pytest.raises(fk.RolloutError, match="token 1 was nan"):
            check_recorded([-1.0, float("nan")], [-1.0, -2.0], "E")
        with pytest.raises(fk.RolloutError, match="1 log-probabilities were recorded for 2 tokens"):
            check_recorded([-1.0], [-1.0, -2.0], "E")
        check_recorded([-1.0, -2.0], [-1.0005, -2.0], "E")

    def test_temperature_of_sampling_and_scoring(self):
        from fkernel.rollout import check_temperature

        with pytest.warns(fk.RolloutWarning, match=r"sampled at temperature 0.7 and are scored at 1"):
            check_temperature(0.7, 1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_temperature(1.0, 1.0)

    def test_truncated_responses(self, model, tokenizer):
        hub = generator(model, tokenizer, sampling=Sampling(max_new_tokens=1))
        with pytest.warns(fk.RolloutWarning, match=r"\d+ of 4 responses were cut off .*U-000-00"):
            hub.generate_update_batch(2, 2, reward_cfg=None)

    def test_two_bos(self, model):
        tokenizer = byte_tokenizer(bos_token="<bos>")
        with pytest.raises(fk.RolloutError, match="begins with two BOS tokens; leave '<bos>' out of the template"):
            generator(model, tokenizer, template=lambda p: f"<bos><bos>{p.question}").build_custom_sequence("a", "b")

    def test_eos_behind_the_prompt(self, model, tokenizer, monkeypatch):
        encode = tokenizer.encode
        monkeypatch.setattr(tokenizer, "encode", lambda text, **options: [*encode(text, **options), 1])
        with pytest.raises(fk.RolloutError, match="put its EOS behind the prompt"):
            generator(model, tokenizer).generate_from_custom_prompts(["a"])

    def test_characters_outside_of_the_vocabulary(self):
        from fkernel.demo.tokenizer import build_tokenizer
        from fkernel.rollout.guards import encode

        with pytest.warns(fk.RolloutWarning, match=r"test-3: .* without \['\?'\]; the policy is asked '1\+1='"):
            encode(build_tokenizer(), "1+1=?", "test-3")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            encode(build_tokenizer(), "1+1=", "test-3")
            encode(byte_tokenizer(bos_token="<bos>"), "wörds  and\nspaces", "test-3")

    def test_boundary_inside_a_token(self, model):
        from transformers import Qwen2Tokenizer

        plain = byte_tokenizer()
        vocab = {**plain.get_vocab()}
        vocab["\u0120a"], vocab["ab"] = vocab.pop("\u0100"), vocab.pop("\u0101")
        options: dict[str, Any] = {"merges": [("a", "b")], "unk_token": None}
        merging = Qwen2Tokenizer(vocab=vocab, eos_token="<eos>", pad_token="<pad>", **options)
        with pytest.warns(fk.RolloutWarning, match="the boundary between the two falls inside a token"):
            generator(model, merging).build_custom_sequence("1a", "b")

    def test_prompt_longer_than_the_context(self, tokenizer):
        hub = generator(policy(context=20), tokenizer)
        with pytest.raises(fk.RolloutError, match="the prompt has 20 tokens, the model's context holds 20"):
            hub.generate_from_custom_prompts(["x" * 20])
        with pytest.raises(
            fk.RolloutError, match=r"15 tokens and 8 new ones exceed .* at most 5 fit \(max_new_tokens\)"
        ):
            hub.generate_from_custom_prompts(["x" * 15])
        with pytest.raises(fk.RolloutError, match="exceed the model's context"):
            hub.build_custom_sequence("x" * 15, "y" * 15)

    def test_policy_without_tokenizer_or_eos(self, model):
        with pytest.raises(fk.RolloutError, match="has no tokenizer"):
            SampleGenerator(model, None)
        with pytest.raises(fk.RolloutError, match="has no EOS token"):
            SampleGenerator(model, byte_tokenizer(eos_token=None))

    def test_what_is_not_there(self, model, tokenizer):
        hub = generator(model, tokenizer)
        with pytest.raises(fk.RolloutError, match="no prompts of the split 'dev'; the generator has 'train', 'test'"):
            hub.generate_update_batch(1, 1, dataset_split="dev")
        with pytest.raises(fk.RolloutError, match="no template 'poem'; expected gsm8k_r1, bare, chat"):
            generator(model, tokenizer, template="poem")
        with pytest.raises(fk.RolloutError, match="completions_per_prompt is 0"):
            hub.generate_update_batch(1, 0)
        with pytest.raises(fk.RolloutError, match="has no token; there is nothing to score"):
            hub.build_custom_sequence("a", "", ended=False)
