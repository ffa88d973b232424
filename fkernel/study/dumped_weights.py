"""Advantages and loss weights of a dumped batch, where its files have none, by the rules that its plan names.

Loss weights are of the whole step, all of its micro-batches together, with t_u tokens of the loss in response u:

    dapo       1 / Σ_v t_v         NeMo-RL's token_level_loss, prime-rl, slime's --calculate-per-token-loss, verl's
               token-mean
    grpo       1 / (n t_u)         slime's and NeMo-RL's means of means, verl's seq-mean-token-mean
    sequence   1 / n               verl's seq-mean-token-sum
    a number   that number         1/loss_denominator of open-instruct

where n counts masked responses too, or what the file says: slime's rollouts, NeMo-RL's rows that are not left out.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from fkernel.errors import PlanError, RolloutError
from fkernel.record.dumps import COUNTED
from fkernel.rollout import GeneratedBatch, loss_weights
from fkernel.shapes import Tensor

EPSILON = {"verl": 1e-6, "slime": 1e-6}
"""What GRPO's advantages add to σ, where it is not TRL's 1e−4."""
OF_A_STEP = "prime_rl"
"""The trainer whose loss divides by the step's tokens and nothing else."""


def advantages_of(batch: GeneratedBatch, update: Any) -> GeneratedBatch:
    """Make advantages of rewards by the plan's rule; those of the file are left as they are.

    Raises:
        PlanError: both the file and the plan say how, or neither.
        RolloutError: a reward is missing, or the rule fails.
    """
    given = any(r.advantage is not None or "advantages" in r.metadata.get("per_token", {}) for r in batch)
    if given and update.advantage is not None:
        raise PlanError("update.advantage: the dump has advantages; leave the rule out.")
    if given:
        return batch
    if update.advantage is None:
        raise PlanError("update.advantage: the dump has rewards and no advantages; give the trainer's rule.")
    rule: Any = update.advantage
    if rule == "grpo" and update.trainer in EPSILON:
        rule = partial(normalised, epsilon=EPSILON[update.trainer])
    return batch.with_advantages(rule)


def normalised(rewards: Tensor, groups: Tensor, epsilon: float) -> Tensor:
    """A_u = (r_u − r̄) / (σ + ε), with σ of k − 1.

    Args:
        rewards: [n].
        groups: [n] int64.
        epsilon: ε.

    Raises:
        RolloutError: a group has one completion, and no σ.

    Example:
        >>> normalised(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), 0.0)
        tensor([ 0.7071, -0.7071])

    Source: verl 0.8, trainer/ppo/core_algos.py, `compute_grpo_outcome_advantage`; slime after 0.3.1, ray/rollout.py,
    `_post_process_rewards`.
    """
    out = torch.zeros_like(rewards)
    for group in groups.unique().tolist():
        own = groups == group
        if int(own.sum()) < 2:
            raise RolloutError("GRPO compares a completion with the others of its group; a group here has only one.")
        values = rewards[own]
        out[own] = (values - values.mean()) / (values.std() + epsilon)
    return out


def weights_of(batch: GeneratedBatch, update: Any, mask: Tensor) -> Tensor:
    """Loss weight of a token of each sequence, [n] float64.

    Args:
        batch: of the whole step.
        update: the plan's.
        mask: [n t] bool, whether the loss is about a token.

    Raises:
        PlanError: no rule is named, or one that needs the micro-batches.
        RolloutError: the rule lacks what it needs.
    """
    n, tokens = len(batch), mask.sum(1)
    rule = update.weights
    if rule is None and update.trainer == OF_A_STEP:
        rule = "dapo"
    if rule is None:
        raise PlanError("update.weights: name the rule that the loss divides by, or the weight of every token.")
    if isinstance(rule, float):
        return torch.full((n,), rule, dtype=torch.float64)
    options = dict(update.weight_options)
    accumulation = options.pop("accumulation", None)
    if (accumulation or 1) != 1 or (rule == "bnpo" and accumulation is None):
        raise PlanError(
            f"update.weights: {rule} is of all rows of the step, and which micro-batch each was in is not in the dump. "
            f"Only a step of one micro-batch can be weighed by bnpo (weight_options: {{accumulation: 1}}); leave "
            f"accumulation out otherwise."
        )
    lengths = [max(1, int(count)) for count in tokens]
    counted = [record.metadata.get(COUNTED) for record in batch]
    if rule == "grpo" and None not in counted:
        pairs = torch.tensor(counted, dtype=torch.float64)
        return 1 / (pairs[:, 0].clamp(min=1) * pairs[:, 1])
    if rule == "dapo":
        options["tokens"] = max(1, int(tokens.sum()))
    return loss_weights(lengths, rule, groups=batch.groups.tolist(), **options)
