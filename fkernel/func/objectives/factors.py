"""Constants that trainers multiply a token's loss by: corrections of the sampler's mismatch, masks of tokens.

A factor m_ut ≥ 0 has no derivative. It multiplies the advantage's part of the loss, and neither the KL penalty nor the
entropy bonus, so it is the advantage that it is multiplied into:

    −w m F(r) A = −w F(r) (m A)

and every loss of advantages takes it, with the ratio of tokens or of sequences: with the latter a token's factor
reaches all tokens of its sequence (`fkernel.func.objectives.ratios`).
"""

from __future__ import annotations

from typing import Any

import torch

from fkernel.errors import BatchError, ModelError
from fkernel.func.objectives.inputs import LossInputs, check_finite, check_setting, read
from fkernel.func.objectives.ratios import LEVELS, mean_over_response
from fkernel.shapes import Tensor


def scale_advantages(inputs: LossInputs, *factors: Tensor) -> LossInputs:
    """Multiply factors into the advantages.

    A_ut ← A_ut Π_i m_i,ut

    Args:
        inputs: with advantages.
        factors: each [n t], ≥ 0, as the functions of this module return them.

    Returns:
        The same inputs, with advantages [n t].

    Raises:
        BatchError: a factor is not [n t], or negative; advantages are missing.
        NonFiniteError: a factor or advantage of a response token is NaN or infinite.

    Example:
        >>> given = LossInputs(torch.zeros(1, 3), torch.tensor([[0, 1, 1]]), advantages=torch.tensor([2.0]))
        >>> scale_advantages(given, torch.tensor([[0.0, 0.5, 1.0]])).advantages
        tensor([[0., 1., 2.]])
    """
    mask, A = read(inputs, "scale_advantages", "advantages")
    for number, factor in enumerate(factors):
        A = A * factor_of(factor, inputs, mask, f"factor {number}")
    return inputs._replace(advantages=A)


def truncated_importance(inputs: LossInputs, level: str = "sequence", low: float = 0.0, high: float = 3.0) -> Tensor:
    """Compute the importance of tokens that another engine sampled, truncated at a cap.

    ρ_ut = exp(ℓ_old,ut − ℓ_sampler,ut) of a token, ρ_u = exp(Σ_t (ℓ_old,ut − ℓ_sampler,ut)) of a sequence
    m_ut = clip(ρ, low, high)

    It stands between the policy as the trainer scores it and as the inference engine sampled it, at the same
    parameters: ℓ_old, and not ℓ, so it stays the same for all steps on a batch. A token that the engine could not score
    (NaN) has ℓ_old − ℓ_sampler = 0.

    Args:
        inputs: with old and sampler.
        level: "token" or "sequence"; the latter is a product over tokens, and no mean as in GSPO.
        low: ≥ 0, the smallest factor; TRL's vllm_importance_sampling_clip_min, 0 for its None.
        high: ≥ low, the largest; TRL's vllm_importance_sampling_clip_max, infinity for its None.

    Returns:
        m, [n t], 0 outside of the response.

    Raises:
        ModelError: the level is unknown, or the range empty.
        BatchError: a field is missing, or of another shape.
        NonFiniteError: a log-probability of a response token is infinite, or old's is NaN; ρ overflows without a cap.

    Example:
        >>> old, sampler = torch.tensor([[0.0, -1.0, -1.0]]), torch.tensor([[0.0, -1.5, -3.0]])
        >>> given = LossInputs(old, torch.tensor([[0, 1, 1]]), old=old, sampler=sampler)
        >>> truncated_importance(given, "token")
        tensor([[0.0000, 1.6487, 3.0000]])

    Source: F. Yao et al., "Your efficient RL framework secretly brings you off-policy RL training" (2025); TRL 1.16's
    vllm_importance_sampling_mode="token_truncate" and "sequence_truncate".
    """
    mask, importance = _importance(inputs, "truncated_importance", level, low, high)
    return _checked(torch.where(mask, importance.clamp(low, high), 0.0))


def masked_importance(inputs: LossInputs, level: str = "sequence", low: float = 0.0, high: float = 3.0) -> Tensor:
    """Compute the importance of tokens that another engine sampled, and leave out what is far off.

    m_ut = ρ where low ≤ ρ ≤ high, 0 elsewhere;  ρ as in `truncated_importance`

    Arguments, returns and errors as there; TRL's default is this one, of sequences.

    Example:
        >>> old, sampler = torch.tensor([[0.0, -1.0, -1.0]]), torch.tensor([[0.0, -1.5, -3.0]])
        >>> given = LossInputs(old, torch.tensor([[0, 1, 1]]), old=old, sampler=sampler)
        >>> masked_importance(given, "token")
        tensor([[0.0000, 1.6487, 0.0000]])
        >>> masked_importance(given)  # e^2.5 is above 3
        tensor([[0., 0., 0.]])

    Source: TRL 1.16's vllm_importance_sampling_mode="token_mask" and "sequence_mask".
    """
    mask, importance = _importance(inputs, "masked_importance", level, low, high)
    return _checked(torch.where(mask & (importance >= low) & (importance <= high), importance, 0.0))


def off_policy_mask(inputs: LossInputs, threshold: float) -> Tensor:
    """Leave out sequences of negative advantage from which the policy has moved away.

    m_ut = 0 where A_ut < 0 and (1/|u|) Σ_t (ℓ_sampler,ut − ℓ_ut) > threshold, 1 elsewhere

    ℓ_old stands for ℓ_sampler where there is none; a token that the sampler could not score (NaN) counts as 0.

    Args:
        inputs: with advantages, and sampler or old.
        threshold: > 0 nats a token; TRL's off_policy_mask_threshold.

    Returns:
        m, [n t], 0 outside of the response.

    Raises:
        ModelError: the threshold is not a positive number.
        BatchError: a field is missing, or of another shape.
        NonFiniteError: a number of a response token is NaN or infinite, but for a sampler's NaN.

    Example:
        >>> logprobs, old = torch.tensor([[0.0, -2.0, -1.0]]), torch.tensor([[0.0, -1.0, -1.0]])
        >>> given = LossInputs(logprobs, torch.tensor([[0, 1, 1]]), torch.tensor([-1.0]), old=old)
        >>> off_policy_mask(given, 0.4), off_policy_mask(given, 0.6)
        (tensor([[0., 0., 0.]]), tensor([[0., 1., 1.]]))

    Source: DeepSeek-AI, "DeepSeek-V3.2" (2025), eq. 9; TRL 1.16's off_policy_mask_threshold.
    """
    check_setting("threshold", threshold, threshold > 0, "a positive number, nats a token")
    sampled = "old" if inputs.sampler is None else "sampler"
    mask, logprobs, A, other = read(inputs, "off_policy_mask", "logprobs", "advantages", sampled)
    divergence = mean_over_response((other - logprobs).nan_to_num(nan=0.0), mask)
    return (mask & ((A >= 0) | (divergence <= threshold))).to(logprobs)


def high_entropy_mask(inputs: LossInputs, quantile: float) -> Tensor:
    """Keep the tokens of highest entropy, out of all of the batch.

    m_ut = 1 where H_ut ≥ the (1 − quantile)-quantile of all response tokens' H, 0 elsewhere

    The batch must be what the trainer takes the quantile of: one micro-batch, of all processes.

    Args:
        inputs: with entropies.
        quantile: the share that is kept, in [0, 1]; 0 keeps the highest alone. TRL's top_entropy_quantile.

    Returns:
        m, [n t], 0 outside of the response. TRL multiplies it into the advantage's part (`scale_advantages`), and hands
        it to the entropy bonus.

    Raises:
        ModelError: the quantile is not in [0, 1].
        BatchError: entropies are missing, or of another shape.
        NonFiniteError: an entropy of a response token is NaN or infinite.

    Example:
        >>> entropies = torch.tensor([[0.0, 0.1, 0.9], [0.0, 0.4, 0.2]])
        >>> given = LossInputs(torch.zeros(2, 3), torch.tensor([[0, 1, 1], [0, 1, 1]]), entropies=entropies)
        >>> high_entropy_mask(given, 0.5)
        tensor([[0., 0., 1.],
                [0., 1., 0.]])

    Source: "Beyond the 80/20 rule" (2025, arXiv 2506.01939); TRL 1.16's top_entropy_quantile.
    """
    check_setting("quantile", quantile, 0 <= quantile <= 1, "a number in [0, 1]: the share of tokens that is kept")
    mask, entropies = read(inputs, "high_entropy_mask", "entropies")
    if not bool(mask.any()):
        return torch.zeros_like(entropies)
    values = entropies.to(torch.promote_types(entropies.dtype, torch.float32))
    threshold = torch.quantile(values[mask], 1 - quantile)
    return (mask & (values >= threshold)).to(entropies)


def factor_of(factor: Tensor, inputs: LossInputs, mask: Tensor, name: str) -> Tensor:
    """Check a factor that the user gave; [n t], 0 outside of the response."""
    given: Any = factor
    if not isinstance(given, Tensor) or given.shape != mask.shape:
        shape = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise BatchError(f"{name} is {shape}; expected [n t] = {list(mask.shape)}, one for each token.")
    values = torch.where(mask, factor.detach().to(inputs.logprobs), 0.0)
    check_finite(values, name, "every response token needs a finite factor")
    if bool((values < 0).any()):
        row = int((values < 0).any(1).nonzero()[0])
        raise BatchError(f"{name} of sequence {row} holds {float(values[row].min()):g}; expected factors ≥ 0.")
    return values


def _importance(inputs: LossInputs, name: str, level: str, low: float, high: float) -> tuple[Tensor, Tensor]:
    """The mask, and ρ at every token; it may overflow, as what is above the cap may."""
    if level not in LEVELS:
        raise ModelError(f"level is {level!r}; expected 'token' or 'sequence': whose importance it is.")
    check_setting("low", low, 0 <= low < torch.inf, "a finite number ≥ 0, the smallest importance")
    check_setting("high", high, high >= low, "a number ≥ low, the largest importance")
    mask, old, sampler = read(inputs, name, "old", "sampler")
    log_ratio = (old - sampler).nan_to_num(nan=0.0)
    if level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(mask)
    return mask, log_ratio.exp()


def _checked(factors: Tensor) -> Tensor:
    check_finite(factors, "exp(old − sampler)", "give a finite high, or look at the sampler's log-probabilities")
    return factors
