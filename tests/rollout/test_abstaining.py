"""Rewards that return nothing, something that is no number, or fail; and what advantages are made of the others."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
import torch

import fkernel as fk
from fkernel.rollout import GeneratedBatch, SampleGenerator, Sampling, TablePrompts, advantages, load_batch, save_batch
from fkernel.rollout.judging import judge_of
from tests.rollout.test_files import record

ROWS = [{"question": f"{a}+{a}?", "answer": str(2 * a)} for a in range(6)]
NAN = float("nan")
NAMES = [f"U-00{g}-0{k}" for g in range(4) for k in range(4)]
REWARDS = [1.0, None, 0.0, 0.5, None, None, 2.0, None, 1.0, 3.0, None, 1.0, None, None, None, None]
RULES = ["group_mean", "grpo", "rloo", "raw"]


def hub_of(model, tokenizer) -> SampleGenerator:
    return SampleGenerator(
        model, tokenizer, TablePrompts("mine", "train", ROWS), template="bare", sampling=Sampling(max_new_tokens=6)
    )


def batch_of(rewards: list[float | None] = REWARDS) -> GeneratedBatch:
    rows = zip(NAMES, rewards, strict=False)
    return GeneratedBatch(tuple(record(name, reward=r, abstained=r is None) for name, r in rows))


def trls(rewards: torch.Tensor, k: int, rule: str) -> torch.Tensor:
    """What TRL 1.16 makes of NaN, which a None becomes: GRPOTrainer, lines 2759 to 2810; RLOOTrainer, 1653 to 1699."""
    from trl.trainer.utils import nanstd

    grouped = rewards.view(-1, k)
    if rule == "rloo":
        counts, sums = (~grouped.isnan()).sum(1, keepdim=True), grouped.nansum(1, keepdim=True)
        return (grouped - (sums - grouped) / (counts - 1)).flatten().nan_to_num(nan=0.0)
    found = grouped - grouped.nanmean(1, keepdim=True)
    if rule == "grpo":
        found = found / (nanstd(grouped, dim=1)[:, None] + 1e-4)
    return found.flatten().nan_to_num(nan=0.0)


def in_odd_places():
    """A reward that abstains from every other response that it meets."""
    met = []

    def sparing(prompt, response):
        met.append(response)
        return None if len(met) % 2 else float(len(met))

    return sparing


@pytest.mark.parametrize("rule", ["group_mean", "grpo", "rloo"])
def test_baselines_are_of_the_judged_as_in_trl(rule):
    given = torch.tensor([NAN if r is None else r for r in REWARDS])
    torch.testing.assert_close(batch_of().with_advantages(rule).advantages, trls(given, 4, rule))


@pytest.mark.parametrize("rule", RULES)
def test_who_abstains_moves_nothing_and_changes_no_other(rule):
    batch = batch_of(REWARDS[:4]).with_advantages(rule)
    assert batch.by_id("U-000-01").advantage == 0.0
    assert batch.by_id("U-000-01").reward is None
    judged = batch_of(REWARDS[:4]).clone_with_subset(lambda each: not each.abstained).with_advantages(rule)
    assert [batch.by_id(name).advantage for name in judged.ids] == [each.advantage for each in judged]


@pytest.mark.parametrize("rule", RULES)
def test_groups_with_one_judged_or_none(rule):
    batch = batch_of().with_advantages(rule)
    assert [each.advantage for each in batch if each.abstained] == [0.0] * 9
    assert batch.by_id("U-001-02").advantage == (2.0 if rule == "raw" else 0.0)
    assert not any(each.advantage for each in batch_of([None] * 4).with_advantages(rule))


def test_rloo_still_needs_two_completions():
    with pytest.raises(fk.RolloutError, match="a group here has only one"):
        GeneratedBatch((record("U-000-00", reward=1.0), record("U-001-00", reward=1.0))).with_advantages("rloo")


def test_rules_of_the_user_see_the_judged_alone():
    met = {}

    def own(rewards, groups):
        met.update(rewards=rewards, groups=groups)
        return (rewards * 2).double()

    found = batch_of(REWARDS[:8]).with_advantages(own)
    assert met["rewards"].tolist() == [1.0, 0.0, 0.5, 2.0]
    assert met["groups"].tolist() == [0, 0, 0, 1]
    assert [each.advantage for each in found] == [2.0, 0.0, 0.0, 1.0, 0.0, 0.0, 4.0, 0.0]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda r, g: r.view(-1, 4), r"raised RuntimeError for 3 rewards \(the other 1 responses abstain\)"),
        (lambda r, g: r[:1], r"gave shape \[1\] for 3 rewards \(the other 1 responses abstain\); expected \[3\]"),
        (lambda r, g: r.tolist(), r"returned a list; expected a tensor \[n\]"),
        (lambda r, g: r / 0, "U-000-00: its advantage is inf; expected a finite number"),
    ],
)
def test_rules_of_the_user_that_fail(rule, message):
    with pytest.raises(fk.RolloutError, match=message):
        batch_of(REWARDS[:4]).with_advantages(rule)


def test_a_reward_that_nobody_gave_is_no_abstention():
    batch = batch_of(REWARDS[:4])
    lost = replace(batch, records=(replace(batch.records[0], reward=None), *batch.records[1:]))
    with pytest.raises(fk.RolloutError, match="1 of 4 sequences have no reward: 'U-000-00'"):
        lost.with_advantages("grpo")
    with pytest.raises(fk.RolloutError, match="1 of 4 sequences have no reward: 'U-000-01'"):
        _ = batch.rewards


def test_a_reward_that_is_set_later_counts():
    batch = (
        batch_of(REWARDS[:4]).with_values("reward", torch.tensor([1.0, 3.0, 1.0, 1.0])).with_advantages("group_mean")
    )
    assert batch.advantages.tolist() == [-0.5, 1.5, -0.5, -0.5]
    assert batch.diagnostics["abstained"] == 0.0


def test_sampled_batches_say_who_abstained(model, tokenizer, tmp_path):
    generator = hub_of(model, tokenizer)
    message = (
        r"The reward .*in_odd_places.<locals>.sparing returned None for 4 of 8 responses \('U-000-00', 'U-000-02'.*\)"
    )
    with pytest.warns(fk.RolloutWarning, match=message):
        batch = generator.generate_update_batch(
            2, 4, reward_cfg=in_odd_places(), advantage_cfg="grpo", weight_cfg="bnpo"
        )
    assert [each.reward is None for each in batch] == [True, False] * 4
    assert [each.abstained for each in batch] == [True, False] * 4
    assert batch.weighted_advantages[::2].tolist() == [0.0] * 4
    tokens = sum(len(each.response_ids) for each in batch)  # theirs, too, as in TRL's loss
    assert {each.weight for each in batch} == {1 / tokens}
    assert batch.diagnostics["mean_reward"] == 5.0
    assert batch.diagnostics["abstained"] == 0.5
    assert batch.diagnostics["without_signal"] == 0.0
    save_batch(batch, tmp_path / "U")
    loaded = load_batch(tmp_path / "U")
    assert loaded == batch
    assert loaded.with_advantages("rloo") == batch.with_advantages("rloo")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        generator.generate_evaluation_batch(2, dataset_split="train", reward_cfg=lambda prompt, response: 1)
    assert not [one for one in told if "returned None" in str(one.message)]


def test_a_reward_that_judges_nothing(model, tokenizer):
    with pytest.warns(fk.RolloutWarning, match="returned None for 4 of 4 responses"):
        batch = hub_of(model, tokenizer).generate_update_batch(1, 4, reward_cfg=lambda p, r: None, advantage_cfg="rloo")
    assert not batch.weighted_advantages.any()
    assert batch.diagnostics["mean_reward"] is None


def test_files_without_abstentions_are_what_they_were(tmp_path):
    place = save_batch(batch_of(REWARDS[:4]), tmp_path / "U")
    rows = [json.loads(line) for line in (place / "records.jsonl").read_text().split("\n") if line]
    assert [row.get("abstained") for row in rows] == [None, True, None, None]


@pytest.mark.parametrize(
    ("value", "reward"),
    [
        (True, 1.0),
        (2, 2.0),
        (Fraction(1, 2), 0.5),
        (Decimal("0.25"), 0.25),
        (torch.tensor(3.0), 3.0),
        (torch.tensor([4], dtype=torch.bfloat16), 4.0),
        (torch.tensor(5.0).numpy(), 5.0),
        (torch.tensor([6.0]).numpy(), 6.0),
    ],
)
def test_one_number_of_whatever_kind_is_a_reward(value, reward):
    judge = judge_of(lambda prompt, response: value)
    assert judge is not None
    found = judge(TablePrompts("mine", "train", ROWS)[0], "4", "U-000-01")
    assert found == reward
    assert type(found) is float


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (NAN, "returned nan, a float"),
        (float("inf"), "returned inf, a float"),
        (-torch.tensor(float("inf")), r"returned tensor\(-inf\), a Tensor"),
        (10**400, r"returned 10+ \.\.\., a int"),
        ("1.0", "returned '1.0', a str"),
        ([1.0], r"returned \[1.0\], a list"),
        ({"score": 1.0}, r"returned \{'score': 1.0\}, a dict"),
        (torch.ones(2), r"returned tensor\(\[1., 1.\]\), a Tensor"),
        (torch.ones(2).numpy(), "returned array.*, a ndarray"),
        (1j, "returned 1j, a complex"),
    ],
)
def test_what_is_no_reward_names_sequence_function_and_value(model, tokenizer, value, message):
    met = []

    def strange(prompt, response):
        met.append(response)
        return value if len(met) == 2 else 1.0

    expected = f"U-000-01: the reward .*strange {message}; expected a finite number, or None where it cannot judge"
    with pytest.raises(fk.RolloutError, match=expected):
        hub_of(model, tokenizer).generate_update_batch(1, 2, reward_cfg=strange)


def test_a_reward_that_fails(model, tokenizer):
    generator = hub_of(model, tokenizer)

    def failing(prompt, response):
        return {"score": 1.0}["reward"]

    with pytest.raises(fk.RolloutError, match=r"U-000-00: the reward .*failing failed: KeyError: 'reward'") as caught:
        generator.generate_update_batch(1, 2, reward_cfg=failing)
    assert isinstance(caught.value.__cause__, KeyError)

    def of_text(text: Any) -> Any:
        return 1.0

    one: Any = of_text
    message = r"E-000-00: .*of_text failed: TypeError: .*reward\(prompt, response text\)"
    with pytest.raises(fk.RolloutError, match=message):
        generator.generate_evaluation_batch(1, dataset_split="train", reward_cfg=one)
    with pytest.raises(fk.RolloutError, match=f"P-000-00: the reward {__name__}.lost failed: ValueError: no answer"):
        generator.generate_from_prompt_ids([1], dataset_split="train", reward_cfg=f"{__name__}.lost")


def lost(prompt, response):
    raise ValueError("no answer")


def test_a_prompt_without_an_answer_names_the_sequence(model, tokenizer):
    rows = TablePrompts("mine", "train", [{"question": "1+1?"}])
    generator = SampleGenerator(model, tokenizer, rows, template="bare", sampling=Sampling(max_new_tokens=3))
    with pytest.raises(fk.RolloutError, match="U-000-00: the reward exact failed: The prompt train-000000 has no ref"):
        generator.generate_update_batch(1, 2, reward_cfg="exact")


@pytest.mark.parametrize("field", ["reward", "advantage", "weight"])
def test_no_number_of_a_record_is_nan(field):
    with pytest.raises(fk.RolloutError, match=f"U-000-01: its {field} is nan; expected a finite number, or None"):
        batch_of(REWARDS[:4]).with_values(field, torch.tensor([1.0, NAN, 1.0, 1.0]))


def test_metadata_that_is_no_json_names_its_sequence(tmp_path):
    odd = GeneratedBatch((record("C-000-00"), record("C-000-01", metadata={"x": {1, 2}})))
    with pytest.raises(fk.RolloutError, match="C-000-01: its metadata or reward is no JSON"):
        save_batch(odd, tmp_path / "C")


def test_a_study_of_rewards_that_abstain_adds_up():
    """What the engine takes as weights is finite, and 0 for those that abstain, whichever rule is asked for later."""
    batch = batch_of().with_advantages("grpo").with_loss_weights("dapo")
    for rule in RULES:
        weights = batch.with_advantages(rule).weighted_advantages
        assert weights.isfinite().all()
        assert not weights[[each.abstained for each in batch]].any()
    assert advantages.among_judged(advantages.raw, torch.tensor([NAN, 2.0]), torch.tensor([0, 0])).tolist() == [
        0.0,
        2.0,
    ]
