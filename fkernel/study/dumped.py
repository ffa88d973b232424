"""Token weights of a dumped batch, from the loss that its plan names: ω and η of each token, in named parts.

    ω = ∂L/∂ℓ,  L = −Σ_ut w_ut m_ut F(r_ut) A_ut + …

with A and m of the file, one a token where the loss had them so; w from the rule that the plan names, over all rows of
the step; and ratios r of

    ℓ, ℓ_old    both the file's, of the trainer before its first step on the batch: all ratios are 1, in the arithmetic
                of the training itself; the file's are held against the checkpoint's, which must be that policy
    ℓ, ℓ_old    the checkpoint's and those of `update.loss.old`, both computed here
    ℓ, ℓ_old    the trainer's, or the checkpoint's, and the sampling engine's (`update.old: sampler`; prime-rl's losses)

A KL penalty is of log-probabilities that are computed here, of checkpoint and reference, unless the file has both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fkernel import func
from fkernel.errors import PlanError, RolloutError
from fkernel.func import objectives
from fkernel.func.objectives import LossInputs, LossTerm
from fkernel.record.dumps import PER_TOKEN
from fkernel.rollout import GeneratedBatch, SampleGenerator, Sampling, TokenStatistics, score
from fkernel.shapes import Tensor
from fkernel.study.config.base import CheckpointPlan
from fkernel.study.dumped_weights import advantages_of, weights_of
from fkernel.study.losses import advantage_terms, terms_beside
from fkernel.study.scores import laid_out

APART, ROW_APART = 0.1, 0.5
"""Nats by which log-probabilities may differ from the trainer's, as a mean over all tokens and over a sequence's: what
half precision and another attention do stays below 0.03."""
SAMPLER = 2.0
"""By how much more those of a sampling engine may, whose policy may be some steps older."""
RATIOS = "update.loss.old: {path: …}, the checkpoint before the first step on this batch, or update.old: sampler"


def with_loss(batch: GeneratedBatch, update: Any, generator: SampleGenerator) -> GeneratedBatch:
    """Make the token weights of a batch that a trainer dumped.

    Args:
        batch: as `fkernel.record.read` returns it.
        update: a `TrainerDump`.
        generator: with the checkpoint's model, and the temperature.

    Returns:
        The sequences that had a part in the loss, with ω and η, and log π and H of the checkpoint.

    Raises:
        PlanError: the plan does not say something that the files do not.
        RolloutError: the batch is not of the size that the plan says, or its log-probabilities are another policy's.
    """
    _check_size(batch, update)
    batch = replace(batch, pad_id=getattr(generator.tokenizer, "pad_token_id", None) or 0)
    batch = advantages_of(_truncated(batch, update), update)
    sampling = Sampling(temperature=generator.sampling.temperature)
    known = score(generator.model, batch.sequences, sampling)
    mask = batch.sequences.response_mask
    now = laid_out(mask, [one.logqs for one in known])
    inputs = _inputs(batch, update, generator, now, sampling)
    loss = update.loss
    terms = advantage_terms(loss, inputs)
    if loss.kl is not None or loss.entropy is not None:
        terms |= terms_beside(loss, _beside(batch, update, generator, inputs, now, sampling))
    return _kept(_weighed(batch, terms), inputs.response_mask, known, sampling)


def streams(batch: GeneratedBatch, name: str) -> Tensor | None:
    """A number of each response token that the file has, [n t] float64; None where it has none."""
    rows = [record.metadata.get(PER_TOKEN, {}).get(name) for record in batch]
    if all(row is None for row in rows):
        return None
    fill = {"loss_mask": 1.0, "weights": 1.0, "advantages": 0.0}  # what is left out where it says nothing new
    if name not in fill and None in rows:
        at = batch.ids[rows.index(None)]
        raise RolloutError(f"{at} has no {name}, and other sequences of the dump have; is it a dump of two runs?")
    filled = [[fill[name]] * len(r.response_ids) if row is None else row for r, row in zip(batch, rows, strict=True)]
    return laid_out(batch.sequences.response_mask, filled)


def loss_mask(batch: GeneratedBatch) -> Tensor:
    """[n t] bool, whether the loss is about a token."""
    mask, kept = batch.sequences.response_mask.bool(), streams(batch, "loss_mask")
    return mask if kept is None else mask & (kept == 1)


def _inputs(
    batch: GeneratedBatch, update: Any, generator: SampleGenerator, now: Tensor, sampling: Sampling
) -> LossInputs:
    loss, mask = update.loss, loss_mask(batch)
    trainer = streams(batch, "old_logprobs")
    sampler = None
    if any(record.logqs for record in batch):
        sampler = laid_out(batch.sequences.response_mask, [record.logqs for record in batch])
    if loss.old is None and not update.minibatch:
        _check_apart(batch, now, trainer, sampler, mask, sampling)
    ℓ, old = _ratio(batch, update, generator, now, trainer, sampler, sampling)
    per_token = streams(batch, "advantages")
    one = torch.tensor([0.0 if r.advantage is None else r.advantage for r in batch], dtype=torch.float64)
    A = one[:, None].expand(mask.shape) if per_token is None else _mixed(batch, one, per_token)
    factor = streams(batch, "weights")
    w = weights_of(batch, update, mask)[:, None].expand(mask.shape) * (1.0 if factor is None else factor)
    if loss.correction is not None and sampler is None:
        raise PlanError("update.loss.correction needs log-probabilities of the sampling engine; the dump has none.")
    entropies = None if loss.top_entropy is None else _entropies(generator, batch, sampling)
    return LossInputs(ℓ, mask, A * getattr(loss, "adv_tau", 1.0), w, old, None, sampler, entropies)


def _mixed(batch: GeneratedBatch, one: Tensor, per_token: Tensor) -> Tensor:
    """Advantages of tokens, where a sequence has several, and of the whole sequence elsewhere."""
    several = torch.tensor([record.advantage is None for record in batch])
    return torch.where(several[:, None], per_token, one[:, None])


def _ratio(
    batch: GeneratedBatch,
    update: Any,
    generator: SampleGenerator,
    now: Tensor,
    trainer: Tensor | None,
    sampler: Tensor | None,
    sampling: Sampling,
) -> tuple[Tensor, Tensor]:
    """ℓ and ℓ_old."""
    own = now if trainer is None else trainer
    kind = update.loss.kind
    if kind in ("dppo", "ipo") or update.old == "sampler":
        if sampler is None:
            raise PlanError(f"update.loss: the ratio of {kind} is to the sampling engine, and the dump has no "
                            f"log-probabilities of one.")  # fmt: skip
        return own, sampler
    if update.loss.old is not None:
        return now, _of(update.loss.old, batch, generator, now, sampling)
    if kind == "policy_gradient":
        return own, own
    if trainer is None or update.minibatch:
        raise PlanError(
            f"update.loss: {kind} needs log-probabilities of the policy before the first step; give {RATIOS}."
        )
    return trainer, trainer


def _of(
    plan: CheckpointPlan, batch: GeneratedBatch, generator: SampleGenerator, now: Tensor, sampling: Sampling
) -> Tensor:
    """Log-probabilities under another checkpoint; `now` where it is the same one."""
    leaf = next(iter(generator.model.parameters()))
    loaded = plan.load_weights(leaf.dtype)
    if loaded.provenance.fingerprint == generator.fingerprint:
        return now
    known = score(loaded.model.to(leaf.device), batch.sequences, sampling)
    return laid_out(batch.sequences.response_mask, [one.logqs for one in known])


def _beside(
    batch: GeneratedBatch,
    update: Any,
    generator: SampleGenerator,
    inputs: LossInputs,
    now: Tensor,
    sampling: Sampling,
) -> LossInputs:
    """Inputs of KL penalty and entropy bonus."""
    if update.loss.kl is None:
        return inputs
    reference = _of(update.loss.kl.reference, batch, generator, now, sampling)
    old = inputs.old if update.loss.old is not None or update.old == "sampler" else now
    return inputs._replace(logprobs=now, old=old, reference=reference)


def _entropies(generator: SampleGenerator, batch: GeneratedBatch, sampling: Sampling) -> Tensor:
    apply, params = func.policy_function(generator.model)
    H = func.evaluate(func.token_entropy(apply, sampling.temperature))
    tokens = func.Sequences(*(leaf.to(next(iter(params.values())).device) for leaf in batch.sequences))
    return H(params, tokens).double().cpu()


def _weighed(batch: GeneratedBatch, terms: dict[str, LossTerm]) -> GeneratedBatch:
    """The batch with its parts; one whose weights are 0 throughout is left out, unless it is the only one."""
    heard = {name: t for name, t in terms.items() if bool(t.omega.any()) or (t.eta is not None and bool(t.eta.any()))}
    kept = heard or {"advantage": terms["advantage"]}
    etas = {name: term.eta for name, term in kept.items() if term.eta is not None}
    omegas = {name: term.omega for name, term in kept.items() if name not in etas or bool(term.omega.any())}
    return batch.with_token_weights(omegas, etas or None, total=objectives.total(kept).omega)


def _kept(batch: GeneratedBatch, mask: Tensor, known: Sequence[TokenStatistics], sampling: Sampling) -> GeneratedBatch:
    """The sequences that the loss is about; what was needed token by token is in their weights now."""
    records = [
        replace(
            record,
            logprobs=one.logprobs,
            logqs=record.logqs or one.logqs,
            entropies=one.entropies,
            metadata={key: value for key, value in record.metadata.items() if key != PER_TOKEN},
        )
        for record, one, heard in zip(batch, known, mask.any(1).tolist(), strict=True)
        if heard
    ]
    if not records:
        raise RolloutError("The loss of the dump is about no token: its masks are 0 throughout.")
    return replace(batch, records=tuple(records), sampling=sampling)


def _truncated(batch: GeneratedBatch, update: Any) -> GeneratedBatch:
    """Mask the responses that were cut off, where TRL's loss left them out."""
    cut = [record.sequence_id for record in batch if record.truncated]
    if update.trainer != "trl" or not cut:
        return batch
    if update.mask_truncated is None:
        raise PlanError(
            f"update.mask_truncated: {len(cut)} of {len(batch)} responses were cut off, {cut[0]} first, and the dump "
            f"does not say whether the loss left them out; give TRL's mask_truncated_completions, true or false."
        )
    if not update.mask_truncated:
        return batch
    records = [
        replace(
            r,
            metadata={
                **r.metadata,
                PER_TOKEN: {**r.metadata.get(PER_TOKEN, {}), "loss_mask": [0] * len(r.response_ids)},
            },
        )
        if r.truncated
        else r
        for r in batch
    ]
    return replace(batch, records=tuple(records))


def _check_size(batch: GeneratedBatch, update: Any) -> None:
    if update.batch_size is not None and len(batch) != update.batch_size:
        several = len(batch) > update.batch_size
        raise PlanError(
            f"update.batch_size is {update.batch_size}, and the dump has {len(batch)} sequences of step {update.step}: "
            + (
                "several optimizer steps were taken on them, and which sequences each was of is not in the file. "
                "Record such a run with fkernel.record.Recorder."
                if several
                else "rows are missing."
            )
        )


def _check_apart(
    batch: GeneratedBatch,
    now: Tensor,
    trainer: Tensor | None,
    sampler: Tensor | None,
    mask: Tensor,
    sampling: Sampling,
) -> None:
    """Hold the file's log-probabilities against the checkpoint's.

    Raises:
        RolloutError: they are another policy's, of other tokens, or at another temperature.
    """
    theirs, factor = (trainer, 1.0) if trainer is not None else (sampler, SAMPLER)
    if theirs is None or (trainer is None and sampling.temperature != 1):
        return  # engines report log-probabilities before or after the temperature, as they are told
    apart = torch.where(mask, (now - theirs).abs(), 0.0)
    rows = apart.sum(1) / mask.sum(1).clamp(min=1)
    whole = float(apart.sum() / mask.sum().clamp(min=1))
    worst = int(rows.argmax())
    if whole > factor * APART or float(rows[worst]) > factor * ROW_APART:
        record = batch.records[worst]
        raise RolloutError(
            f"{record.sequence_id} ({record.metadata['place']}): its log-probabilities in the file are "
            f"{float(rows[worst]):.3g} nats a token from the checkpoint's at temperature {sampling.temperature:g}, "
            f"and all are {whole:.3g}. Is it the checkpoint before this step, and the sampling's temperature? For a "
            f"later step on the same batch give update.loss.old."
        )
