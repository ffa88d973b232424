"""Evaluate a plan's loss on U: columns, and the parts that stand beside them; scores U with the loss's other policies.

    of advantages   f_u = Σ_t ρ_ut ℓ_ut with ρ of sign(A_u): ω = −w A ρ, and contributions are c w A ⟨ḡ_e, P ∇f_u⟩
    KL, entropy     −Σ_u Σ_t (ω_ut ∇ℓ_ut + η_ut ∇H_ut) of that part alone, a vector added to the ascent direction
    token weights   f_u = −Σ_t (ω_ut ℓ_ut + η_ut H_ut), the whole loss; its parts are vectors of the same sum
    preference      A = +1 for chosen and −1 for rejected, w = (β/n) σ(−m); columns stay ∇S

ℓ_old, under the policy that sampled U, is scored with `old`; it is ℓ itself where the plan's checkpoint sampled U; else
the recorded log-probabilities. Where ρ depends on sign(A), so do the columns: other advantages must keep their signs,
or be 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from fkernel import func
from fkernel.engine import weighted_gradient
from fkernel.errors import PlanError, RolloutError, listing
from fkernel.func import Weighted, objectives, weighted_logprob
from fkernel.func.objectives import LossInputs, LossTerm, clipped_ratio
from fkernel.rollout import GeneratedBatch
from fkernel.shapes import Tensor, Tree
from fkernel.study.config.loss import (
    ClippedLoss,
    CrossEntropyLoss,
    LossPlan,
    PolicyLoss,
    PreferenceLoss,
    TokenWeightsLoss,
)
from fkernel.study.loss_terms import LossTerms
from fkernel.study.preferences import facts_of_pairs
from fkernel.study.rows import Policy
from fkernel.study.scores import logprobs_of, old_logprobs, own_logprobs, sampler_logprobs


def spec_of_loss(loss: LossPlan | None, dtype: torch.dtype, made: GeneratedBatch | None) -> dict[str, Any]:
    """The loss's part of a workspace's spec, JSON; {} for no loss.

    Args:
        loss: the plan's.
        dtype: in which checkpoints are loaded.
        made: U, where it is given rather than drawn.

    Raises:
        PlanError: U was sampled by another policy than `old`.
    """
    if loss is None:
        return {}
    fingerprints = {
        place: checkpoint.load_weights(dtype).provenance.fingerprint for place, checkpoint in loss.checkpoints.items()
    }
    sampler = None if made is None else made.checkpoint
    if "old" in fingerprints and sampler is not None and sampler != fingerprints["old"]:
        raise PlanError(
            f"step.loss.old is the checkpoint {fingerprints['old'][:12]}, and U was written by {sampler[:12]}; name "
            f"the checkpoint that sampled U."
        )
    settings = loss.model_dump(mode="json", exclude={"old": True, "reference": True, "kl": {"reference"}})
    spec: dict[str, Any] = {"loss": {**settings, "policies": fingerprints}}
    return spec if made is None or not loss.foreign else {**spec, "sampled_by": sampler}


def as_it_came(loss: LossPlan | None, batch: GeneratedBatch) -> GeneratedBatch:
    """Reset the advantages and weights that a preference loss sets, so that they do not count in U's fingerprint."""
    if not isinstance(loss, PreferenceLoss | CrossEntropyLoss):
        return batch
    if isinstance(loss, CrossEntropyLoss):
        return replace(batch, records=tuple(replace(record, advantage=None) for record in batch))
    records = (replace(record, advantage=record.reward, weight=None) for record in batch)
    return replace(batch, records=tuple(records))


def terms_of(
    loss: LossPlan | None,
    batch: GeneratedBatch,
    policy: Policy,
    tokens: func.Sequences,
    microbatch: int,
    fingerprint: str | None,
) -> LossTerms | None:
    """Evaluate the loss on U; None for no loss.

    Args:
        loss: the plan's.
        batch: U, as `weighed` returns it.
        policy: θ, and the temperature at which all policies score.
        tokens: U's, on the parameters' device.
        microbatch: sequences of the greatest length in one pass.
        fingerprint: the plan's checkpoint's.

    Raises:
        PlanError: ℓ_old is not available at this temperature.
        RolloutError: a loss weight is negative.
        NonFiniteError: a ratio overflows.
    """
    if loss is None or isinstance(loss, CrossEntropyLoss):
        return None
    if isinstance(loss, PreferenceLoss):
        return LossTerms(None, {"kind": loss.kind, "pairs": facts_of_pairs(batch)})
    if isinstance(loss, TokenWeightsLoss):
        return _of_token_weights(batch, policy, tokens, microbatch)
    inputs = _inputs(loss, batch, policy, tokens, microbatch, fingerprint)
    facts: dict[str, Any] = {"kind": loss.kind}
    ratio = log_ratio = None
    if not _is_logprob(loss):
        ratio, mask = ratio_of(loss, inputs), inputs.response_mask.bool()
        counted = mask & (_signs(inputs) != 0)[:, None]
        assert inputs.old is not None
        log_ratio = torch.where(mask, inputs.logprobs - inputs.old, 0.0)
        facts |= _apart(log_ratio[counted]) | _clipped(ratio[counted])
    parts, more = _beside(loss, inputs, policy, tokens, microbatch)
    plain = not (loss.correction or loss.off_policy_mask or loss.top_entropy or getattr(loss, "delta", None))
    reclips = isinstance(loss, ClippedLoss) and plain  # what `clipped_ratio_of` knows
    return LossTerms(ratio, facts | more, parts, log_ratio=log_ratio if reclips else None)


def ratio_of(loss: PolicyLoss, inputs: LossInputs) -> Tensor:
    """ρ of U's tokens, [n_U t], for the signs of the advantages: ω = −w A ρ, whatever the loss of advantages."""
    signs = _signs(inputs)
    given = inputs._replace(advantages=signs, weights=torch.ones_like(signs))
    return -advantage_terms(loss, given)["advantage"].omega * signs[:, None]


def advantage_terms(loss: PolicyLoss, inputs: LossInputs) -> dict[str, LossTerm]:
    """Parts of a loss of advantages, its factors multiplied in: {"advantage": ω [n t]}, and what else the loss has."""
    factors = _factors(loss, inputs)
    if loss.kind == "vespo" and loss.correction is not None and loss.correction.level == "token":
        importance, *factors = factors  # it goes into the sequence's ratio, and not into the advantage
        of = partial(objectives.vespo, correction=importance)
        advantage = lambda loss, x: of(x, loss.positive, loss.negative)  # noqa: E731
    else:
        advantage = ADVANTAGE[loss.kind]
    return advantage(loss, objectives.scale_advantages(inputs, *factors) if factors else inputs)


def clipped_ratio_of(loss: LossTerms, advantages: Tensor, mask: Tensor, low: float, high: float) -> Tensor:
    """ρ of a clipped ratio under another clipping range, from its log-ratios."""
    assert loss.log_ratio is not None
    kind = loss.facts["kind"]
    zeros, signs = torch.zeros_like(loss.log_ratio), advantages.to(loss.log_ratio).sign()
    given = LossInputs(loss.log_ratio, mask, signs, torch.ones_like(signs), zeros)
    level = "token" if kind == "clipped_ratio" else "sequence"
    terms = objectives.luspo(given, low, high) if kind == "luspo" else clipped_ratio(given, low, high, level=level)
    return -terms["advantage"].omega * signs[:, None]


ADVANTAGE: Mapping[str, Callable[[Any, LossInputs], dict[str, LossTerm]]] = MappingProxyType({
    "policy_gradient": lambda loss, x: objectives.policy_gradient(x),
    "clipped_ratio": lambda loss, x: clipped_ratio(x, loss.low, loss.high, loss.delta),
    "sequence_ratio": lambda loss, x: clipped_ratio(x, loss.low, loss.high, loss.delta, "sequence"),
    "luspo": lambda loss, x: objectives.luspo(x, loss.low, loss.high, loss.delta, loss.level),
    "cispo": lambda loss, x: objectives.cispo(x, loss.cap, loss.level),
    "sapo": lambda loss, x: objectives.sapo(x, loss.positive, loss.negative, loss.level),
    "vespo": lambda loss, x: objectives.vespo(x, loss.positive, loss.negative),
    "dppo": lambda loss, x: objectives.dppo(x, loss.low, loss.high, loss.kl_tau),
    "ipo": lambda loss, x: objectives.ipo(x, loss.threshold, loss.kl_tau),
})  # fmt: skip
"""{kind: (the plan's, inputs) -> terms}: losses of advantages, each linear in |A|."""


def _signs(inputs: LossInputs) -> Tensor:
    assert inputs.advantages is not None
    return inputs.advantages.sign()


def _is_logprob(loss: PolicyLoss) -> bool:
    """Whether U's columns are ∇S: the policy gradient, all of whose tokens count alike."""
    return loss.kind == "policy_gradient" and not (loss.correction or loss.off_policy_mask or loss.top_entropy)


def _inputs(
    loss: PolicyLoss,
    batch: GeneratedBatch,
    policy: Policy,
    tokens: func.Sequences,
    microbatch: int,
    fingerprint: str | None,
) -> LossInputs:
    """Score U with every policy that the loss looks at."""
    now = own_logprobs(policy, tokens, microbatch)
    foreign = loss.kind != "policy_gradient"
    old = old_logprobs(loss.old, batch, policy, tokens, now, microbatch, fingerprint) if foreign else now
    reference = None if loss.kl is None else logprobs_of(loss.kl.reference, policy, tokens, microbatch)
    needs_entropy = loss.top_entropy is not None
    H = func.token_entropy(policy.apply, policy.temperature)
    entropies = func.evaluate(H, microbatch)(policy.params, tokens) if needs_entropy else None
    mask = tokens.response_mask
    sampler = sampler_logprobs(batch, mask).to(now)
    return LossInputs(now, mask, batch.advantages.to(now), _weights(batch).to(now), old, reference, sampler, entropies)


def _factors(loss: PolicyLoss, inputs: LossInputs) -> list[Tensor]:
    """Constants [n t] that the loss multiplies into advantages."""
    factors = []
    if (importance := loss.correction) is not None:
        make = objectives.truncated_importance if importance.mode == "truncate" else objectives.masked_importance
        factors.append(make(inputs, importance.level, importance.low, importance.high))
    if loss.off_policy_mask is not None:
        factors.append(objectives.off_policy_mask(inputs, loss.off_policy_mask))
    if loss.top_entropy is not None:
        factors.append(objectives.high_entropy_mask(inputs, loss.top_entropy))
    return factors


def _beside(
    loss: PolicyLoss, inputs: LossInputs, policy: Policy, tokens: func.Sequences, microbatch: int
) -> tuple[dict[str, Tree], dict[str, Any]]:
    """Parts that stand beside the advantage's, as vectors of the ascent direction; and their facts."""
    facts = dict[str, Any]()
    if loss.kl is not None:
        assert inputs.reference is not None
        d = (inputs.reference - inputs.logprobs)[inputs.response_mask.bool()]
        facts["kl"] = float((d.expm1() - d).mean())
    return _vectors(terms_beside(loss, inputs), policy, tokens, microbatch), facts


def terms_beside(loss: PolicyLoss, inputs: LossInputs) -> dict[str, LossTerm]:
    """Parts that stand beside the advantage's: "kl" and "entropy", where the loss has them."""
    terms = dict[str, LossTerm]()
    if loss.kl is not None:
        level = getattr(loss, "level", "sequence" if loss.kind == "sequence_ratio" else "token")
        corrected = partial(objectives.corrected_kl_penalty, level=level)
        terms |= (corrected if loss.kl.corrected else objectives.kl_penalty)(inputs, loss.kl.beta)
    if loss.entropy is not None:
        weight = loss.entropy.weight
        given = inputs if weight is None else inputs._replace(weights=torch.full_like(inputs.logprobs, weight))
        kept = None if loss.top_entropy is None else objectives.high_entropy_mask(inputs, loss.top_entropy)
        terms |= objectives.entropy_bonus(given, loss.entropy.coefficient, kept)
    return terms


def _vectors(terms: Mapping[str, LossTerm], policy: Policy, tokens: func.Sequences, microbatch: int) -> dict[str, Tree]:
    """What each part adds to the ascent direction: −(Σ ω ∇ℓ + η ∇H)."""
    f = weighted_logprob(policy.trained, policy.temperature)
    ones = next(iter(policy.params.values())).new_ones(len(tokens.input_ids))
    return {
        name: weighted_gradient(
            f, policy.params, Weighted(tokens, -term.omega, None if term.eta is None else -term.eta), ones, microbatch
        )
        for name, term in terms.items()
    }


def _of_token_weights(batch: GeneratedBatch, policy: Policy, tokens: func.Sequences, microbatch: int) -> LossTerms:
    """Columns of the whole loss, and its parts as vectors; ω and η are the loss's, and columns ascend."""
    like = next(iter(policy.params.values()))
    empty = torch.zeros(tokens.input_ids.shape, dtype=torch.float64)
    omega, eta = batch.token_weights, batch.entropy_weights
    terms = {
        name: LossTerm(omega.get(name, empty).to(like), eta[name].to(like) if name in eta else None)
        for name in dict.fromkeys([*omega, *eta])
    }
    whole = objectives.total(terms)
    counted = tokens.response_mask.bool()
    sizes = {name: float(term.omega[counted].abs().sum()) for name, term in terms.items()}
    parts = _vectors(terms, policy, tokens, microbatch) if len(terms) > 1 else {}
    return LossTerms(
        -whole.omega, {"kind": "token_weights", "parts": sizes}, parts, None if whole.eta is None else -whole.eta,
        within=tuple(parts),
        whole=True,
    )  # fmt: skip


def _weights(batch: GeneratedBatch) -> Tensor:
    """[n] w ≥ 0, so that w A has the sign of A."""
    w = batch.with_values("advantage", torch.ones(len(batch))).weighted_advantages
    if wrong := [name for name, value in zip(batch.ids, w.tolist(), strict=True) if value < 0]:
        raise RolloutError(f"step.loss needs loss weights w ≥ 0, and these have w < 0: {listing(wrong)}.")
    return w


def _apart(log_ratios: Tensor) -> dict[str, Any]:
    """Range and mean of the ratios to the policy that sampled U."""
    r = log_ratios.double().exp()
    return {"ratio": {"min": float(r.min()), "mean": float(r.mean()), "max": float(r.max())}} if len(r) else {}


def _clipped(ratios: Tensor) -> dict[str, Any]:
    """The fraction of tokens that are clipped."""
    return {"clipped": float((ratios == 0).double().mean())} if len(ratios) else {}
