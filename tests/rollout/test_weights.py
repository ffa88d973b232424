"""Loss weights and advantages are the trainers' own: TRL's loss, differentiated, is −Σ w A ∇S."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fkernel as fk
from fkernel import func
from fkernel.rollout import advantages, loss_weights
from tests.checkpoint.writers import TOKENIZER, qwen2

PROMPTS = [[2, 3, 4], [5, 6], [7, 8, 9, 10], [2, 2]]
RESPONSES = [[3, 4, 1], [5, 1], [6, 7, 8, 9, 10, 1], [11, 12, 13, 14]]
A = torch.tensor([0.7, -1.2, 0.4, 0.1])
LONGEST = 6


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> Any:
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    args = GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("run")),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=LONGEST,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
    )
    return GRPOTrainer(
        model=qwen2(),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "1+1="}] * 4),
        processing_class=TOKENIZER,
    )


def padded(rows: list[list[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return ids, mask


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("rule", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_trl_losses_are_weighted_sums_of_scores(trainer, rule, accumulation):
    prompt_ids, prompt_mask = padded(PROMPTS, left=True)
    completion_ids, completion_mask = padded(RESPONSES, left=False)
    tokens = 40  # of the whole generation batch, which has more than these four
    inputs = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": A,
        "num_items_in_batch": torch.tensor(tokens),
    }
    trainer.loss_type = rule
    trainer.current_gradient_accumulation_steps = accumulation
    trainer.args.steps_per_generation = 2 * accumulation
    trainer.model.train().zero_grad()
    trainer._compute_loss(trainer.model, inputs).backward()
    theirs = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}

    w = loss_weights(
        [len(r) for r in RESPONSES],
        rule,
        max_completion_length=LONGEST,
        accumulation=accumulation,
        tokens=tokens,
        steps_per_generation=2 * accumulation,
    ).float()
    model = qwen2()
    model.set_attn_implementation("eager")
    apply, params = func.make_functional(model.eval())
    pulled = func.vjp(func.sequence_logprob(apply))(params, func.pad(PROMPTS, RESPONSES), w * A)
    scale = max(float(g.abs().max()) for g in theirs.values())
    assert scale > 1e-4
    for name, g in theirs.items():
        torch.testing.assert_close(-pulled[name], g, rtol=0, atol=1e-5 * scale)


def test_group_scaled_advantages_are_trls():
    rewards, groups = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0]), torch.tensor([0, 0, 0, 4, 4, 4])
    each = rewards.view(2, 3)
    expected = (each - each.mean(1, keepdim=True)) / (each.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(advantages.grpo(rewards, groups), expected.flatten())
    assert not advantages.grpo(rewards, groups)[3:].any()


def test_rules_are_what_their_equations_say():
    rewards, groups = torch.tensor([3.0, 1.0, 2.0, 5.0]), torch.tensor([1, 1, 1, 0])
    torch.testing.assert_close(advantages.group_mean(rewards, groups), torch.tensor([1.0, -1.0, 0.0, 0.0]))
    torch.testing.assert_close(advantages.rloo(rewards[:3], groups[:3]), torch.tensor([1.5, -1.5, 0.0]))
    assert torch.equal(advantages.raw(rewards, groups), rewards)
    with pytest.raises(fk.RolloutError, match="a group here has only one"):
        advantages.rloo(rewards, groups)


def test_weights_of_groups_and_sequences():
    lengths, groups = [1, 3, 4], [0, 0, 1]
    assert loss_weights(lengths, "sequence").tolist() == [1 / 3] * 3
    torch.testing.assert_close(
        loss_weights(lengths, "group_token", groups=groups), torch.tensor([1 / 8] * 3, dtype=torch.float64)
    )
    torch.testing.assert_close(
        loss_weights([1, 3, 2], "group_token", groups=groups), torch.tensor([1 / 8, 1 / 8, 1 / 4], dtype=torch.float64)
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: loss_weights([2], "dr_grpo"), "give max_completion_length"),
        (lambda: loss_weights([2], "group_token"), "give groups"),
        (lambda: loss_weights([2], "ppo"), "no loss weights 'ppo'; expected sequence, grpo"),
        (lambda: loss_weights([], "grpo"), "responses of at least one token"),
        (lambda: loss_weights([1, 0], "grpo"), "responses of at least one token"),
        (lambda: advantages.advantage_of("best"), "no advantage rule 'best'; expected group_mean"),
        (lambda: advantages.advantage_of("nowhere.rule"), "'nowhere.rule' is not a rule"),
    ],
)
def test_what_is_missing_is_said(call, message):
    with pytest.raises(fk.RolloutError, match=message):
        call()
