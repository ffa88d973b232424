"""Teacher forcing: log-probabilities and entropies of given responses, token by token, in one forward pass each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fkernel import func
from fkernel.func import Sequences
from fkernel.func.inputs import by_length, groups, length, take, token_grant, trim
from fkernel.rollout.sampling import Sampling
from fkernel.shapes import Tensor, Tree


class TokenStatistics(NamedTuple):
    """Statistics of one response, one number a token.

    Attributes:
        logprobs: log π, temperature 1, nats.
        logqs: log q under a sampling distribution; −∞ where it would never have drawn the token.
        entropies: of π, nats.
    """

    logprobs: tuple[float, ...]
    logqs: tuple[float, ...]
    entropies: tuple[float, ...]


def score(model: Any, batch: Sequences, sampling: Sampling, microbatch: int = 8) -> list[TokenStatistics]:
    """Compute the statistics of every response of a batch.

    Args:
        model: a causal language model; or `func.InShards`, of which all ranks must score the same batch.
        batch: n sequences.
        sampling: what q is.
        microbatch: sequences of the greatest length in one forward pass; of shorter ones there are more.

    Returns:
        One a sequence, in the batch's order.

    Raises:
        BatchError: the batch cannot be scored; see `fkernel.func.sequence_logprob`.
    """
    apply, params = func.policy_function(model)
    func.sequence_logprob(apply).check(batch)
    device = next(iter(params.values())).device
    batch = Sequences(*(leaf.to(device) for leaf in batch))
    order = by_length(batch)
    ordered = take(batch, order)
    by_row: dict[int, TokenStatistics] = {}
    with torch.no_grad():
        for rows in groups(ordered, token_grant(batch, microbatch)):
            part = trim(take(ordered, rows))
            statistics = statistics_of(apply, params, part, sampling)
            by_row.update(zip(order[rows].tolist(), statistics, strict=True))
    return [by_row[row] for row in range(length(batch))]


def statistics_of(apply: func.Apply, params: Tree, batch: Sequences, sampling: Sampling) -> list[TokenStatistics]:
    """Compute the statistics of one microbatch, in one forward pass."""
    logits = apply(params, batch.input_ids, batch.attention_mask)[:, :-1]
    scored = batch.response_mask[:, 1:].bool()
    z: Tensor = logits[scored].to(torch.promote_types(logits.dtype, torch.float32))  # [tokens v]
    ids = batch.input_ids[:, 1:][scored][:, None]
    log_p = z.log_softmax(-1)
    finite = torch.where(log_p == -torch.inf, 0.0, log_p)
    for warp in sampling.warpers:
        z = warp(ids, z)  # pyright: ignore[reportArgumentType]
    columns = (log_p.gather(1, ids)[:, 0], z.log_softmax(-1).gather(1, ids)[:, 0], -(log_p.exp() * finite).sum(-1))
    each = scored.sum(1).tolist()
    split: Sequence[Any] = [column.split(each) for column in columns]
    return [TokenStatistics(*(tuple(part[row].tolist()) for part in split)) for row in range(len(each))]
