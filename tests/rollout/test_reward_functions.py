"""Several reward functions, those of TRL's signature among them, and advantages split by them."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

import fkernel as fk
from fkernel.rollout import (
    GeneratedBatch,
    SampleGenerator,
    Sampling,
    TablePrompts,
    load_batch,
    save_batch,
    split_advantages,
)
from fkernel.rollout.advantages import RULES
from fkernel.rollout.judging import panel_of, takes_completions
from fkernel.rollout.template import chat
from tests.rollout.conftest import byte_tokenizer
from tests.rollout.test_files import record

ROWS = [{"question": f"{a}+{a}?", "solution": str(2 * a), "level": a} for a in range(6)]
TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fk.RolloutWarning)
        yield


def generator_of(model: Any, tokenizer: Any, **options: Any) -> SampleGenerator:
    source = TablePrompts("mine", "train", ROWS, answer="solution")
    options = {"template": "bare", "sampling": Sampling(max_new_tokens=6), **options}
    return SampleGenerator(model, tokenizer, source, **options)


def brevity(completions: Any, **columns: Any) -> list[float | None]:
    """A reward of TRL's signature."""
    return [-float(len(completion)) for completion in completions]


def evens(prompt: Any, response: str) -> float:
    return float(len(response) % 2)


def parity(prompt: Any, response: str) -> float | None:
    return None if len(response) % 3 == 0 else float(len(response) % 2)


# ------------------------------------------------------------------------------------------------ TRL's signature


class Own:
    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[float]:
        return [0.0 for _ in completions]

    def method(self, prompt: Any, response: str) -> float:
        return 0.0


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (brevity, True),
        (lambda **columns: [], True),
        (lambda completion_ids, **_: [], True),
        (lambda prompts, **_: [], True),
        (Own(), True),
        (Own().method, False),
        (evens, False),
        (lambda prompt, response, **options: 1.0, False),
        (lambda *given: 1.0, False),
        (max, False),
    ],
)
def test_a_signature_tells_who_takes_completions(reward, expected):
    assert takes_completions(reward) is expected


@pytest.mark.parametrize("conversational", [False, True], ids=["texts", "chats"])
def test_a_function_of_trls_signature_is_given_what_trl_gives_it(model, tmp_path, conversational):
    """TRL's own `_calculate_rewards`, over the same prompts and completions."""
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    tokenizer = byte_tokenizer(chat_template=TURNS) if conversational else byte_tokenizer()
    met: list[dict[str, Any]] = []

    def watched(prompts: Any, completions: Any, completion_ids: Any, solution: Any, level: Any, **others: Any) -> Any:
        met.append({"prompts": prompts, "completions": completions, "completion_ids": completion_ids})
        met[-1] |= {"solution": solution, "level": level, "others": {*others}}
        return [None if step % 3 == 0 else float(len(str(c))) for step, c in enumerate(completions)]

    template = chat(tokenizer, "Be brief.") if conversational else "bare"
    batch = generator_of(model, tokenizer, template=template).generate_update_batch(
        2, 4, reward_cfg={"watched": watched, "short": brevity}, reward_weights=[1.0, 0.1], advantage_cfg="grpo"
    )
    ours = met.pop()

    prompts = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{row['level']}+{row['level']}?"}]
        if conversational
        else f"{row['level']}+{row['level']}?"
        for row in ROWS
    ]
    rows = [
        {"prompt": p, "solution": row["solution"], "level": row["level"]} for p, row in zip(prompts, ROWS, strict=True)
    ]
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[watched, brevity],
        args=GRPOConfig(
            output_dir=str(tmp_path), bf16=False, gradient_checkpointing=False, use_cpu=True, report_to=[],
            per_device_train_batch_size=8, num_generations=4, reward_weights=[1.0, 0.1],
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    inputs = [rows[int(one.provenance.global_prompt_id[-6:])] for one in batch]
    ids = [list(one.response_ids) for one in batch]
    asked = [each["prompt"] for each in inputs]
    contents = tokenizer.batch_decode(ids, skip_special_tokens=True)
    said = [[{"role": "assistant", "content": c}] for c in contents] if conversational else contents
    values = trainer._calculate_rewards(inputs, asked, said, ids)
    theirs = met.pop()
    assert {key: value for key, value in ours.items() if key != "others"} == {
        key: value for key, value in theirs.items() if key != "others"
    }
    assert theirs["others"] <= ours["others"]
    recorded = [[float("nan") if value is None else value for value in one.rewards.values()] for one in batch]
    torch.testing.assert_close(torch.tensor(recorded), values, equal_nan=True)
    total = (values * torch.tensor([1.0, 0.1])).nansum(1)
    torch.testing.assert_close(batch.rewards, total)
    grouped = total.view(-1, 4)
    expected = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(batch.advantages, expected.flatten(), rtol=1e-4, atol=1e-4)


def test_a_single_function_of_trls_signature_is_a_reward(model, tokenizer):
    generator = generator_of(model, tokenizer)
    batch = generator.generate_update_batch(2, 3, reward_cfg=brevity, advantage_cfg="raw")
    expected = [-float(len(tokenizer.decode(list(r.response_ids), skip_special_tokens=True))) for r in batch]
    assert batch.rewards.tolist() == expected
    assert all(not one.rewards for one in batch)
    assert generator.rewards_of(batch, brevity) == expected
    named = f"{__name__}.brevity"
    assert generator.generate_update_batch(2, 3, reward_cfg=named).rewards.tolist() == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda n: [1.0] * (n - 1), "returned 3 values for 4 completions; expected a list of one number each"),
        (lambda n: 1.0, "returned a float for 4 completions"),
        (lambda n: "1111", "returned a str for 4 completions"),
        (lambda n: [1.0, "2", 3.0, 4.0], r"U-000-01: the reward .* returned '2', a str; expected a finite number"),
        (lambda n: torch.tensor([1.0, 2.0, float("nan"), 4.0]), "U-000-02: the reward .* a Tensor; expected a finite"),
    ],
)
def test_what_is_no_list_of_rewards(model, tokenizer, values, message):
    with pytest.raises(fk.RolloutError, match=message):
        generator_of(model, tokenizer).generate_update_batch(1, 4, reward_cfg=lambda completions, **_: values(4))


def test_a_function_of_trls_signature_that_fails(model, tokenizer):
    def failing(completions: Any, lost: Any, **_: Any) -> Any:
        return lost

    async def later(completions: Any, **_: Any) -> Any:
        return [1.0 for _ in completions]

    asynchronous: Any = later

    generator = generator_of(model, tokenizer)
    message = r"U-000-00 to U-000-03: the reward .*failing failed: TypeError: .*'lost'.*It has TRL's signature"
    with pytest.raises(fk.RolloutError, match=message):
        generator.generate_update_batch(1, 4, reward_cfg=failing)
    with pytest.raises(fk.RolloutError, match="later is asynchronous; wrap it: lambda"):
        generator.generate_update_batch(1, 4, reward_cfg=asynchronous)


# -------------------------------------------------------------------------------------------- several functions


def test_several_rewards_are_recorded_with_their_weights(model, tokenizer, tmp_path):
    generator = generator_of(model, tokenizer)
    given = {"even": evens, "short": brevity}
    batch = generator.generate_update_batch(2, 4, reward_cfg=given, reward_weights={"short": 0.1, "even": 2.0})
    for one in batch:
        assert [*one.rewards] == ["even", "short"]
        assert one.reward_weights == {"even": 2.0, "short": 0.1}
        assert one.reward == 2.0 * (one.rewards["even"] or 0.0) + 0.1 * (one.rewards["short"] or 0.0)
    save_batch(batch, tmp_path / "U")
    assert load_batch(tmp_path / "U") == batch
    listed = generator.generate_update_batch(2, 4, reward_cfg=[evens, f"{__name__}.brevity"])
    assert [*listed.records[0].rewards] == ["evens", "brevity"]
    assert {*listed.records[0].reward_weights.values()} == {1.0}
    assert generator.rewards_of(batch, given, [2.0, 0.1]) == [one.reward for one in batch]


def test_who_is_judged_by_one_function_has_a_reward(model, tokenizer):
    def silent(prompt: Any, response: str) -> None:
        return None

    generator = generator_of(model, tokenizer)
    batch = generator.generate_update_batch(2, 4, reward_cfg={"parity": parity, "silent": silent})
    assert [one.abstained for one in batch] == [one.rewards["parity"] is None for one in batch]
    assert {one.rewards["silent"] for one in batch} == {None}


@pytest.mark.parametrize(
    ("given", "weights", "message"),
    [
        ([evens, evens], None, "rewards are named 'evens', 'evens'; expected one or more different names"),
        ([], None, "rewards are named nothing"),
        ({"a": evens}, {"b": 1.0}, "Weights are of 'b', the rewards are 'a'; give one for each"),
        ([evens], [1.0, 2.0], r"Weights are \[1.0, 2.0\]; expected 1 finite numbers, for 'evens'"),
        ([evens], [float("nan")], "expected 1 finite numbers"),
        (evens, [1.0], "Weights of rewards are given for one reward"),
        ({"a": None}, None, "A reward among 'a' is None"),
        ({"a": "nowhere.reward"}, None, "'nowhere.reward' is not a reward"),
    ],
)
def test_rewards_that_cannot_be_weighed(given, weights, message):
    with pytest.raises(fk.RolloutError, match=message):
        panel_of(given, None, weights)


# ---------------------------------------------------------------------------------------- advantages by function

VALUES = [(1.0, 0.5), (0.0, None), (None, None), (2.0, -1.0), (0.5, 0.5), (None, 3.0), (1.0, 1.0), (None, None)]


def rewarded(weights: tuple[float, float] = (1.0, 0.3)) -> GeneratedBatch:
    records = []
    for i, values in enumerate(VALUES):
        total = None if values == (None, None) else sum(w * (v or 0.0) for w, v in zip(weights, values, strict=True))
        rewards = dict(zip(("right", "format"), values, strict=True))
        named = dict(zip(("right", "format"), weights, strict=True))
        records.append(
            record(
                f"U-00{i // 4}-0{i % 4}", reward=total, abstained=total is None, rewards=rewards, reward_weights=named
            )
        )
    return GeneratedBatch(tuple(records))


@pytest.mark.parametrize("rule", RULES)
def test_the_parts_add_up(rule):
    batch = rewarded().with_advantages(rule)
    parts = split_advantages(batch, rule)
    assert [*parts] == ["reward:right", "reward:format"]
    total = torch.stack([*parts.values()]).sum(0)
    torch.testing.assert_close(total.float(), batch.advantages)
    assert not total[[2, 7]].any()
    alone = replace(batch, records=tuple(replace(one, advantage=None) for one in batch))
    assert {k: v.tolist() for k, v in split_advantages(alone, rule).items()} == {
        k: v.tolist() for k, v in parts.items()
    }


@pytest.mark.parametrize("rule", ["group_mean", "rloo", "raw"])
def test_a_linear_rule_makes_each_part_of_its_own_reward(rule):
    """What the rule gives where one function is the only reward, and the same responses abstain."""
    batch = rewarded()
    for name, weight in (("right", 1.0), ("format", 0.3)):
        own = [None if one.reward is None else weight * (one.rewards[name] or 0.0) for one in batch]
        only = replace(batch, records=tuple(replace(one, reward=r) for one, r in zip(batch, own, strict=True)))
        torch.testing.assert_close(
            split_advantages(batch, rule)[f"reward:{name}"].float(), only.with_advantages(rule).advantages
        )


def test_grpo_divides_by_the_deviation_of_the_total():
    batch = rewarded()
    part = split_advantages(batch, "grpo")["reward:format"]
    share = torch.tensor([0.15, 0.0, -0.3])  # of the three that are judged in the first group
    total = torch.tensor([1.15, 0.0, 1.7])
    torch.testing.assert_close(part[[0, 1, 3]].float(), (share - share.mean()) / (total.std() + 1e-4))


def test_where_functions_cancel_nobody_has_an_advantage_and_none_a_part():
    """In float32, as trainers record rewards: 0.1 + 0.2 is not 0.3 + 0, and a deviation of 4e-9 is none."""
    sums = [(0.1, 0.2), (0.3, 0.0), (0.2, 0.1), (0.0, 0.3)]
    values = [tuple(torch.tensor(pair).tolist()) for pair in sums]
    weights = {"a": 1.0, "b": 1.0}
    records = [
        record(f"U-000-0{i}", reward=sum(pair), rewards={"a": pair[0], "b": pair[1]}, reward_weights=weights)
        for i, pair in enumerate(values)
    ]
    batch = GeneratedBatch(tuple(records))
    assert not any(part.any() for part in split_advantages(batch.with_advantages("grpo"), "grpo").values())
    assert all(part.any() for part in split_advantages(batch, "group_mean").values())


@pytest.mark.parametrize(
    ("change", "rule", "message"),
    [
        (lambda b: b, "best", "advantage rule 'best' is not known to be linear in the rewards"),
        (
            lambda b: b.with_values("reward", torch.ones(8)),
            "raw",
            r"U-000-00: its reward is 1.0, and its functions' values",
        ),
        (lambda b: b.with_advantages("grpo"), "raw", "U-000-00: its advantage is .*, and the rule 'raw' makes"),
        (
            lambda b: replace(b, records=(replace(b.records[0], rewards={}, reward_weights={}), *b.records[1:])),
            "raw",
            "U-000-00 has the rewards of no function by name",
        ),
        (
            lambda b: replace(
                b, records=(*b.records[:1], replace(b.records[1], rewards={"x": 1.0}, reward_weights={"x": 1.0}))
            ),
            "raw",
            "U-000-01 has the rewards 'x', U-000-00 'right', 'format'; expected the same functions' values",
        ),
    ],
)
def test_advantages_that_have_no_parts(change, rule, message):
    with pytest.raises(fk.RolloutError, match=message):
        split_advantages(change(rewarded()), rule)
