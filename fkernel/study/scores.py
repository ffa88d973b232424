"""Log-probabilities of U's tokens under the policies that a loss looks at, [n_U t] each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from fkernel import func
from fkernel.errors import PlanError
from fkernel.rollout import GeneratedBatch, check_recorded
from fkernel.shapes import Tensor
from fkernel.study.config.base import CheckpointPlan
from fkernel.study.rows import Policy


def own_logprobs(policy: Policy, tokens: func.Sequences, microbatch: int) -> Tensor:
    """Token log-probabilities under the plan's checkpoint, [n t]."""
    return func.evaluate(func.token_logprobs(policy.apply, policy.temperature), microbatch)(policy.params, tokens)


def logprobs_of(checkpoint: CheckpointPlan, policy: Policy, tokens: func.Sequences, microbatch: int) -> Tensor:
    """Token log-probabilities under another checkpoint, [n t]; its model is freed afterwards."""
    apply, params = checkpoint.load_policy(policy.params)
    return func.evaluate(func.token_logprobs(apply, policy.temperature), microbatch)(params, tokens)


def old_logprobs(
    old: CheckpointPlan | None,
    batch: GeneratedBatch,
    policy: Policy,
    tokens: func.Sequences,
    now: Tensor,
    microbatch: int,
    fingerprint: str | None,
) -> Tensor:
    """Token log-probabilities under the policy that sampled U, [n t]."""
    mask = tokens.response_mask.bool()
    if old is not None:
        logprobs = logprobs_of(old, policy, tokens, microbatch)
        if batch.checkpoint is None and policy.temperature == 1:  # no fingerprint: compare with the records
            for row, record in enumerate(batch):
                check_recorded(record.logprobs, logprobs[row][mask[row]].tolist(), record.sequence_id)
        return logprobs
    if batch.checkpoint is not None and batch.checkpoint == fingerprint:
        return now
    if policy.temperature != 1:
        raise PlanError(
            f"step.loss needs log-probabilities of the policy that sampled U at temperature {policy.temperature:g}, "
            f"and U's records have them at 1; give step.loss.old: {{path: …}}, the checkpoint that sampled U."
        )
    return laid_out(mask, [record.logprobs for record in batch]).to(now)


def sampler_logprobs(batch: GeneratedBatch, mask: Tensor) -> Tensor:
    """Token log-probabilities under the distribution that was sampled from, as recorded, [n t]; 0 elsewhere."""
    return laid_out(mask, [record.logqs for record in batch])


def laid_out(mask: Tensor, values: Iterable[Sequence[float]]) -> Tensor:
    """Lay one number a response token out as log-probabilities are, [n t] float64."""
    laid = torch.zeros(mask.shape, dtype=torch.float64)
    laid[mask.cpu().bool()] = torch.tensor([value for row in values for value in row], dtype=torch.float64)
    return laid
