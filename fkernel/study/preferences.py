"""Advantages and weights that a loss sets instead of U's own: DPO's of pairs, and those of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fkernel import func
from fkernel.errors import RolloutError, listing
from fkernel.func import objectives
from fkernel.func.objectives import LossInputs
from fkernel.rollout import GeneratedBatch
from fkernel.study.config.loss import CrossEntropyLoss, LossPlan, PreferenceLoss
from fkernel.study.rows import Policy
from fkernel.study.scores import logprobs_of, own_logprobs

MARGINS = "preference"
"""Metadata key of a record's pairs and their margins."""


def weighed(
    loss: LossPlan | None, batch: GeneratedBatch, policy: Policy, tokens: func.Sequences, microbatch: int
) -> GeneratedBatch:
    """Set the advantages and loss weights of a preference loss; other losses use U's own.

    A sequence's advantage is the sign of its pairs' summed weights, and its loss weight the absolute value.

    Raises:
        RolloutError: pairs cannot be formed from rewards, or name an unknown sequence.
    """
    if isinstance(loss, CrossEntropyLoss):
        ones, w = torch.ones(len(batch)), [record.weight for record in batch]
        count = sum(len(record.response_ids) for record in batch)
        weights = torch.tensor([1 / count if weight is None else weight for weight in w])
        return batch.with_values("advantage", ones).with_values("weight", weights)
    if not isinstance(loss, PreferenceLoss):
        return batch
    pairs = _by_reward(batch) if loss.pairs is None else _by_id(batch, loss.pairs)
    chosen, rejected = torch.tensor(pairs).T
    now, reference = own_logprobs(policy, tokens, microbatch), logprobs_of(loss.reference, policy, tokens, microbatch)
    log_ratios = (now - reference).sum(1).cpu()
    margins = loss.beta * (log_ratios[chosen] - log_ratios[rejected])
    inputs = LossInputs(now, tokens.response_mask, reference=reference)
    omega = objectives.preference(inputs, torch.tensor(pairs), loss.beta)["preference"].omega
    total = -(omega.sum(1) / tokens.response_mask.sum(1)).cpu()  # all tokens of a response have one ω
    pairs_of: list[list[dict[str, Any]]] = [[] for _ in batch]
    for (c, r), m in zip(pairs, margins.tolist(), strict=True):
        for row, other in ((c, r), (r, c)):
            pairs_of[row].append({"with": batch.ids[other], "chosen": row == c, "margin": m})
    records = (
        replace(record, metadata={**record.metadata, MARGINS: listed})
        for record, listed in zip(batch, pairs_of, strict=True)
    )
    annotated = replace(batch, records=tuple(records))
    return annotated.with_values("advantage", total.sign()).with_values("weight", total.abs())


def _by_reward(batch: GeneratedBatch) -> list[tuple[int, int]]:
    """Pair the two responses of every prompt, the one with the higher reward first."""
    prompts: dict[tuple[int, ...], list[int]] = {}
    for row, record in enumerate(batch):
        prompts.setdefault(record.prompt_ids, []).append(row)
    rewards, pairs = batch.rewards.tolist(), []
    for rows in prompts.values():
        names = [batch.ids[row] for row in rows]
        if len(rows) != 2:
            raise RolloutError(
                f"step.loss pairs the two responses of a prompt, and one has {len(rows)}: {listing(names)}; give "
                f"step.loss.pairs: [[chosen id, rejected id], …]."
            )
        a, b = rows
        if rewards[a] == rewards[b]:
            raise RolloutError(
                f"{names[0]} and {names[1]} have the same reward, {rewards[a]:g}: neither is preferred; leave the "
                f"two out of U, or give step.loss.pairs."
            )
        pairs.append((a, b) if rewards[a] > rewards[b] else (b, a))
    return pairs


def _by_id(batch: GeneratedBatch, named: tuple[tuple[str, str], ...]) -> list[tuple[int, int]]:
    """Find the rows of named pairs; every sequence must be in one."""
    row_of = {name: row for row, name in enumerate(batch.ids)}
    for pair in named:
        records = [batch.by_id(name) for name in pair]
        if records[0].prompt_ids != records[1].prompt_ids:
            raise RolloutError(f"step.loss.pairs: {pair[0]} and {pair[1]} answer different prompts.")
    if missing := sorted({*batch.ids} - {name for pair in named for name in pair}):
        raise RolloutError(f"step.loss.pairs: {listing(missing)} is in no pair; leave it out of U, or pair it.")
    return [(row_of[chosen], row_of[rejected]) for chosen, rejected in named]


def facts_of_pairs(batch: GeneratedBatch) -> list[dict[str, Any]]:
    """List each pair once, with its margin."""
    return [
        {"chosen": record.sequence_id, "rejected": pair["with"], "margin": pair["margin"]}
        for record in batch
        for pair in record.metadata[MARGINS]
        if pair["chosen"]
    ]
