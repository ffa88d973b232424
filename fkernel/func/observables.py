"""Quantities other than log π, each a function (params, batch) -> [n] for the same engine.

    mean_entropy      (1/|response|) Σ_t H_t                            nats a token
    kl_divergence     Σ_t KL(π_θ(·|x_<t) ‖ π_ref(·|x_<t))               nats, over the response's positions
    log_odds          S(a) − S(b)                                       nats, of two responses
    expected_reward   Σ_k p_k r_k,  p = softmax_k S(a_k)                the rewards' unit, over different answers

Contributions of U to f are as for S: ⟨∇f(e), P ∇S(u)⟩ · c w_u A_u.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from fkernel.boundary import public
from fkernel.errors import BatchError
from fkernel.func.inputs.batch import Sequences
from fkernel.func.inputs.objective import Objective, bare
from fkernel.func.logprob import LogitsFn, sequence_logprob, token_entropy
from fkernel.shapes import Tensor, Tree


class Pair(NamedTuple):
    """Two responses to each prompt.

    Attributes:
        first: n sequences.
        second: n sequences.
    """

    first: Sequences
    second: Sequences


class Answers(NamedTuple):
    """A finite set of answers to each prompt; duplicates count once.

    Attributes:
        answers: k batches of n sequences: the k-th answer to every prompt.
        rewards: [n k]; the mean over duplicates counts.
    """

    answers: tuple[Sequences, ...]
    rewards: Tensor


@public
def mean_entropy(apply: LogitsFn, temperature: float = 1.0) -> Objective:
    """Return the mean entropy of the distributions that a response was sampled from, nats a token.

    (1/|response|) Σ_{t in response} H_t

    Args:
        apply: (params, input_ids, attention_mask) -> logits [n t v], as `make_functional` returns it.
        temperature: τ > 0.

    Returns:
        (params, Sequences[n t]) -> [n].

    Raises:
        As `sequence_logprob`.

    Example:
        >>> from fkernel.func import pad
        >>> uniform = lambda params, ids, mask: params["w"] * torch.zeros(*ids.shape, 4)
        >>> mean_entropy(uniform)({"w": torch.ones(())}, pad([[0]], [[1, 2]]))  # log 4
        tensor([1.3863])
    """
    H = token_entropy(apply, temperature)

    def mean(params: Tree, batch: Sequences) -> Tensor:
        return bare(H)(params, batch).sum(1) / batch.response_mask.sum(1)

    return Objective(mean, H.check, "the mean entropy", apply)


@public
def kl_divergence(
    apply: LogitsFn, reference: Tree, temperature: float = 1.0, reference_apply: LogitsFn | None = None
) -> Objective:
    """Return the divergence from a reference policy, along the response.

    Σ_{t in response} Σ_v π_θ(v) (log π_θ(v) − log π_ref(v))

    Args:
        apply: as in `mean_entropy`.
        reference: the reference's parameters, {name: [*shape]}: all of them, whichever are in the policy's `params`.
        temperature: τ > 0, of both.
        reference_apply: the reference's apply; None for `apply`, whose own constants are then used for parameters that
            are not in `reference`.

    Returns:
        (params, Sequences[n t]) -> [n], nats.

    Raises:
        As `sequence_logprob`.

    Example:
        >>> from fkernel.func import pad
        >>> logits = lambda params, ids, mask: params["w"] * torch.ones(*ids.shape, 2).cumsum(-1)
        >>> kl = kl_divergence(logits, {"w": torch.zeros(())})
        >>> kl({"w": torch.zeros(())}, pad([[0]], [[1]]))
        tensor([0.])
    """
    S = sequence_logprob(apply, temperature)
    return Objective(partial(_kl, apply, reference_apply or apply, reference, temperature), S.check, "KL", apply)


def _kl(
    policy: LogitsFn, other: LogitsFn, reference: Tree, temperature: float, params: Tree, batch: Sequences
) -> Tensor:
    log_p, log_q = (
        (apply(theta, batch.input_ids, batch.attention_mask)[:, :-1] / temperature).log_softmax(-1)
        for apply, theta in ((policy, params), (other, reference))
    )
    inside = log_p != -torch.inf
    gap = torch.where(inside, log_p - torch.where(inside, log_q, 0.0), 0.0)
    each = (log_p.exp() * gap).sum(-1)
    return torch.where(batch.response_mask[:, 1:].bool(), each, 0.0).sum(1)


@public
def log_odds(apply: LogitsFn, temperature: float = 1.0) -> Objective:
    """Return the log-odds of two responses.

    S(first) − S(second)

    Args:
        apply: as in `mean_entropy`.
        temperature: τ > 0.

    Returns:
        (params, Pair of n) -> [n], nats.

    Raises:
        As `sequence_logprob`.

    Example:
        >>> from fkernel.func import pad
        >>> uniform = lambda params, ids, mask: params["w"] * torch.zeros(*ids.shape, 4)
        >>> log_odds(uniform)({"w": torch.ones(())}, Pair(pad([[0]], [[1]]), pad([[0]], [[1, 2]])))
        tensor([1.3863])
    """
    S = sequence_logprob(apply, temperature)

    def odds(params: Tree, batch: Pair) -> Tensor:
        return bare(S)(params, batch.first) - bare(S)(params, batch.second)

    def check(batch: Pair) -> None:
        S.check(batch.first)
        S.check(batch.second)

    return Objective(odds, check, "log-odds", apply)


@public
def expected_reward(apply: LogitsFn, temperature: float = 1.0) -> Objective:
    """Return the expected reward over a finite set of answers, conditional on the answer being in the set.

    Σ_k p_k r_k,  p_k = exp S(a_k) / Σ_l exp S(a_l),  k and l over the answers that differ in a token

    An answer that occurs n_k times counts once: each occurrence has p_k / n_k.

    Args:
        apply: as in `mean_entropy`.
        temperature: τ > 0.

    Returns:
        (params, Answers of n) -> [n], the rewards' unit.

    Raises:
        BatchError: (when called) rewards are not one for each answer.
        As `sequence_logprob`.

    Example:
        >>> from fkernel.func import pad
        >>> uniform = lambda params, ids, mask: params["w"] * torch.zeros(*ids.shape, 4)
        >>> answers = Answers((pad([[0]], [[1]]), pad([[0]], [[2]])), torch.tensor([[1.0, 0.0]]))
        >>> expected_reward(uniform)({"w": torch.ones(())}, answers)
        tensor([0.5000])
    """
    S = sequence_logprob(apply, temperature)

    def expectation(params: Tree, batch: Answers) -> Tensor:
        scores = torch.stack([bare(S)(params, answer) for answer in batch.answers], 1)
        scores = scores - _times_given(batch.answers).to(scores).log()
        return (scores.softmax(1) * batch.rewards.to(scores)).sum(1)

    def check(batch: Answers) -> None:
        if batch.rewards.ndim != 2 or batch.rewards.shape[1] != len(batch.answers):
            raise BatchError(
                f"rewards have shape {list(batch.rewards.shape)} for {len(batch.answers)} answers; expected [n k], one "
                f"reward for each answer."
            )
        for answer in batch.answers:
            S.check(answer)

    return Objective(expectation, check, "the expected reward", apply)


def _times_given(answers: tuple[Sequences, ...]) -> Tensor:
    """Count the occurrences of each answer to a prompt, [n k]: 1 where it differs from all others in a token."""
    width = max(answer.input_ids.shape[1] for answer in answers)

    def identity(answer: Sequences) -> Tensor:
        """Return what identifies an answer, [n 2 t]: tokens and response mask; −1 in padding."""
        both = torch.stack([answer.input_ids, answer.response_mask.to(answer.input_ids)], 1)
        shown = both.masked_fill(~answer.attention_mask[:, None].bool(), -1)
        return torch.nn.functional.pad(shown, (0, width - shown.shape[-1]), value=-1)

    given = torch.stack([identity(answer) for answer in answers], 1)
    return (given[:, :, None] == given[:, None]).flatten(3).all(3).sum(2)
