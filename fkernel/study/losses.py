"""From a plan's loss to what it makes of U: tokens' ratios, a penalty, pairs' weights; by scoring U with its policies.

    clipped ratios   U's columns are f_u = Σ_t ρ_ut ℓ_ut, ρ as the surrogate of sign(A_u) has it:
                     ρ_ut = r_ut, and 0 where clipped; then ω = w A ρ, and contributions are c w A ⟨∇S_e, P ∇f_u⟩
    KL penalty       Σ_u Σ_t ω_ut ∇ℓ_ut of the penalty alone, one vector that is added to the ascent
    preference       A = +1 of the chosen and −1 of the rejected, w = (β/n) σ(−m); columns stay ∇S

ℓ_old is of the policy that sampled U: scored with `old`; ℓ itself where that is the plan's checkpoint; else what U's
records have. Where ρ depends on sign(A), so do the columns: other advantages must keep their signs, or be 0.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fkernel import func
from fkernel.errors import PlanError, RolloutError, listing
from fkernel.func import Weighted, losses, weighted_logprob
from fkernel.rollout import GeneratedBatch, check_recorded
from fkernel.shapes import Tensor, Tree
from fkernel.study.config.base import CheckpointPlan
from fkernel.study.config.loss import ClippedRatioLoss, KLPlan, LossPlan, PolicyGradientLoss, PreferenceLoss
from fkernel.study.loss_terms import LossTerms
from fkernel.study.rows import Policy

MARGINS = "preference"
"""Key of a record's metadata: the pairs that it is in, with their margins."""


def spec_of_loss(loss: LossPlan | None, dtype: torch.dtype, made: GeneratedBatch | None) -> dict[str, Any]:
    """List what a loss decides of a workspace, JSON; nothing, where there is none.

    Args:
        loss: the plan's.
        dtype: that checkpoints are loaded in.
        made: U, where it is given rather than drawn.

    Raises:
        PlanError: U is of another policy than `old`.
    """
    if loss is None:
        return {}
    prints = {place: one.load_weights(dtype).provenance.fingerprint for place, one in loss.checkpoints.items()}
    sampler = None if made is None else made.checkpoint
    if "old" in prints and sampler is not None and sampler != prints["old"]:
        raise PlanError(
            f"step.loss.old is the checkpoint {prints['old'][:12]}, and U was written by {sampler[:12]}; name the "
            f"checkpoint that sampled U."
        )
    found = loss.model_dump(mode="json", exclude={"old": True, "reference": True, "kl": {"reference"}})
    spec: dict[str, Any] = {"loss": {**found, "policies": prints}}
    return spec if made is None or not loss.foreign else {**spec, "sampled_by": sampler}


def as_it_came(loss: LossPlan | None, batch: GeneratedBatch) -> GeneratedBatch:
    """Leave out what the loss sets: U is told by what decides it."""
    if not isinstance(loss, PreferenceLoss):
        return batch
    records = (replace(record, advantage=record.reward, weight=None) for record in batch)
    return replace(batch, records=tuple(records))


def weighed(
    loss: LossPlan | None, batch: GeneratedBatch, policy: Policy, tokens: func.Sequences, microbatch: int
) -> GeneratedBatch:
    """Set the advantages and loss weights that a preference loss has; other losses take U's own.

    A sequence's advantage is the sign of what its pairs say together, and its weight the size.

    Raises:
        RolloutError: pairs cannot be told, or name a sequence that is not there.
    """
    if not isinstance(loss, PreferenceLoss):
        return batch
    pairs = _by_reward(batch) if loss.pairs is None else _by_id(batch, loss.pairs)
    chosen, rejected = torch.tensor(pairs).T
    scores = _own(policy, tokens, microbatch).sum(1) - _scored(loss.reference, policy, tokens, microbatch).sum(1)
    margins = (loss.beta * (scores[chosen] - scores[rejected])).cpu()
    up, down = losses.preference_weights(margins, loss.beta)
    total = torch.zeros(len(batch), dtype=up.dtype).index_add_(0, chosen, up).index_add_(0, rejected, down)
    met: list[list[dict[str, Any]]] = [[] for _ in batch]
    for (c, r), m in zip(pairs, margins.tolist(), strict=True):
        for own, other in ((c, r), (r, c)):
            met[own].append({"with": batch.ids[other], "chosen": own == c, "margin": m})
    records = (
        replace(record, metadata={**record.metadata, MARGINS: pairs_of})
        for record, pairs_of in zip(batch, met, strict=True)
    )
    told = replace(batch, records=tuple(records))
    return told.with_values("advantage", total.sign()).with_values("weight", total.abs())


def terms_of(
    loss: LossPlan | None,
    batch: GeneratedBatch,
    policy: Policy,
    tokens: func.Sequences,
    microbatch: int,
    fingerprint: str | None,
) -> LossTerms | None:
    """Compute what a loss makes of U; None where there is none.

    Args:
        loss: the plan's.
        batch: U, weighed.
        policy: θ, and the temperature at which all policies score.
        tokens: U's, where the parameters are.
        microbatch: sequences of the greatest length under way at once.
        fingerprint: of the plan's checkpoint.

    Raises:
        PlanError: ℓ_old cannot be had.
        RolloutError: a loss weight is negative.
        NonFiniteError: a ratio overflows.
    """
    if loss is None:
        return None
    if isinstance(loss, PreferenceLoss):
        return LossTerms(None, None, {"kind": loss.kind, "pairs": _facts_of_pairs(batch)})
    now, w = _own(policy, tokens, microbatch), _weights(batch)
    if isinstance(loss, PolicyGradientLoss):
        penalty, kl = _penalty(loss.kl, w, policy, tokens, now, now, microbatch)
        return LossTerms(None, penalty, {"kind": loss.kind, "kl": kl})
    old = _old(loss.old, batch, policy, tokens, now, microbatch, fingerprint)
    signs, mask = batch.advantages.to(now).sign(), tokens.response_mask.bool()
    of = losses.clipped_ratio_weights if isinstance(loss, ClippedRatioLoss) else losses.clipped_sequence_ratio_weights
    ratio = of(now, old, signs, mask, loss.low, loss.high) * signs[:, None]
    counted = mask & (signs != 0)[:, None]
    facts: dict[str, Any] = {"kind": loss.kind, **_apart((now - old)[counted]), **_clipped(ratio[counted])}
    if loss.kl is None:
        return LossTerms(ratio, None, facts)
    penalty, kl = _penalty(loss.kl, w, policy, tokens, now, old, microbatch)
    return LossTerms(ratio, penalty, {**facts, "kl": kl})


def _penalty(
    kl: KLPlan,
    w: Tensor,
    policy: Policy,
    tokens: func.Sequences,
    now: Tensor,
    old: Tensor,
    microbatch: int,
) -> tuple[Tree, float]:
    """The penalty's share of the ascent, and the mean of k3 over response tokens, nats."""
    reference = _scored(kl.reference, policy, tokens, microbatch)
    w, mask = w.to(now), tokens.response_mask.bool()
    omega = (
        losses.corrected_kl_penalty_weights(now, old, reference, w, mask, kl.beta)
        if kl.corrected
        else losses.kl_penalty_weights(now, reference, w, mask, kl.beta)
    )
    pull = func.vjp(weighted_logprob(policy.trained, policy.temperature), microbatch)
    d = (reference - now)[mask]
    return pull(policy.params, Weighted(tokens, omega), torch.ones_like(w)), float((d.expm1() - d).mean())


def _own(policy: Policy, tokens: func.Sequences, microbatch: int) -> Tensor:
    """ℓ of the plan's checkpoint, [n t]."""
    return func.evaluate(func.token_logprobs(policy.apply, policy.temperature), microbatch)(policy.params, tokens)


def _scored(one: CheckpointPlan, policy: Policy, tokens: func.Sequences, microbatch: int) -> Tensor:
    """Score U with another policy, [n t]; its model is let go of."""
    apply, params = one.load_policy(policy.params)
    return func.evaluate(func.token_logprobs(apply, policy.temperature), microbatch)(params, tokens)


def _old(
    old: CheckpointPlan | None,
    batch: GeneratedBatch,
    policy: Policy,
    tokens: func.Sequences,
    now: Tensor,
    microbatch: int,
    fingerprint: str | None,
) -> Tensor:
    """ℓ of the policy that sampled U, [n t]."""
    mask = tokens.response_mask.bool()
    if old is not None:
        found = _scored(old, policy, tokens, microbatch)
        if batch.checkpoint is None and policy.temperature == 1:  # nothing but the records tells whose it is
            for row, record in enumerate(batch):
                check_recorded(record.logprobs, found[row][mask[row]].tolist(), record.sequence_id)
        return found
    if batch.checkpoint is not None and batch.checkpoint == fingerprint:
        return now
    if policy.temperature != 1:
        raise PlanError(
            f"step.loss needs log-probabilities of the policy that sampled U at temperature {policy.temperature:g}, "
            f"and U's records have them at 1; give step.loss.old: {{path: …}}, the checkpoint that sampled U."
        )
    found = torch.zeros(mask.shape, dtype=torch.float64)
    found[mask.cpu()] = torch.tensor([value for record in batch for value in record.logprobs], dtype=torch.float64)
    return found.to(now)


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
    """Find the rows of pairs that are named; every sequence is in one."""
    place = {name: row for row, name in enumerate(batch.ids)}
    for pair in named:
        records = [batch.by_id(name) for name in pair]
        if records[0].prompt_ids != records[1].prompt_ids:
            raise RolloutError(f"step.loss.pairs: {pair[0]} and {pair[1]} answer different prompts.")
    if missing := sorted({*batch.ids} - {name for pair in named for name in pair}):
        raise RolloutError(f"step.loss.pairs: {listing(missing)} is in no pair; leave it out of U, or pair it.")
    return [(place[chosen], place[rejected]) for chosen, rejected in named]


def _weights(batch: GeneratedBatch) -> Tensor:
    """[n] w, none of them negative: the sign of w A is the advantage's."""
    w = batch.with_values("advantage", torch.ones(len(batch))).weighted_advantages
    if wrong := [name for name, value in zip(batch.ids, w.tolist(), strict=True) if value < 0]:
        raise RolloutError(f"step.loss needs loss weights w ≥ 0, and these have w < 0: {listing(wrong)}.")
    return w


def _facts_of_pairs(batch: GeneratedBatch) -> list[dict[str, Any]]:
    """List the pairs, with their margins."""
    return [
        {"chosen": record.sequence_id, "rejected": pair["with"], "margin": pair["margin"]}
        for record in batch
        for pair in record.metadata[MARGINS]
        if pair["chosen"]
    ]


def _apart(log_ratios: Tensor) -> dict[str, Any]:
    """How far U's tokens are from the policy that sampled them."""
    r = log_ratios.double().exp()
    return {"ratio": {"min": float(r.min()), "mean": float(r.mean()), "max": float(r.max())}} if len(r) else {}


def _clipped(ratios: Tensor) -> dict[str, Any]:
    """The share of U's tokens that the surrogate leaves out."""
    return {"clipped": float((ratios == 0).double().mean())} if len(ratios) else {}
