"""Losses that are log-likelihoods, weighted by constants: L = Σ_ut c_ut ℓ_ut, so that ω = c.

The policy gradient is one, and so are losses that hold their ratio constant (detached): it weighs, and no gradient goes
through it.
"""

from __future__ import annotations

import math

import torch

from fkernel.func.objectives.factors import factor_of
from fkernel.func.objectives.inputs import LossInputs, check_setting, read
from fkernel.func.objectives.ratios import ratio_of
from fkernel.func.objectives.terms import LossTerm, term_of
from fkernel.shapes import Tensor

_SMALLEST, _LARGEST = math.log(1e-8), 20.0
"""Log-ratios of a sequence between which TRL's VESPO holds them."""


def policy_gradient(inputs: LossInputs) -> dict[str, LossTerm]:
    """Compute ω of the policy gradient, and of every ratio loss while π is the policy that sampled.

    L = −Σ_ut w_ut A_ut ℓ_ut,  ω_ut = −w_ut A_ut

    Args:
        inputs: with advantages and weights.

    Returns:
        {"advantage": ω [n t]}.

    Raises:
        BatchError: a field is missing, of another shape, or a weight is negative.
        NonFiniteError: a number of a response token is NaN or infinite.

    Example:
        >>> mask = torch.tensor([[0, 1, 1], [0, 1, 0]])
        >>> given = LossInputs(torch.zeros(2, 3), mask, torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.5]))
        >>> policy_gradient(given)["advantage"].omega
        tensor([[ 0.0000, -0.5000, -0.5000],
                [ 0.0000,  1.0000,  0.0000]])

    Source: R. Williams, "Simple statistical gradient-following algorithms" (1992). Not in TRL as a loss of its own: its
    GRPO losses are this one at r = 1.
    """
    mask, A, w = read(inputs, "policy_gradient", "advantages", "weights")
    return {"advantage": term_of(mask, -w * A)}


def cispo(inputs: LossInputs, cap: float, level: str = "token") -> dict[str, LossTerm]:
    """Compute ω of CISPO, whose ratio is capped and held constant: no token is left out.

    L = −Σ_ut w_ut min(r_ut, cap) A_ut ℓ_ut, the ratio held constant
    ω_ut = −w_ut min(r_ut, cap) A_ut

    Args:
        inputs: with advantages, weights and old.
        cap: > 0, the largest ratio: TRL's epsilon_high itself, NOT 1 + epsilon_high. ScaleRL takes 5; left at TRL's
            default it is 0.2, which scales almost every token down to a fifth.
        level: "token" or "sequence", whose ratio it is; TRL's importance_sampling_level.

    Returns:
        {"advantage": ω [n t]}.

    Raises:
        ModelError, BatchError, NonFiniteError: as in `clipped_ratio`.

    Example:
        >>> logprobs, old = torch.tensor([[0.0, -1.0, -1.0]]), torch.tensor([[0.0, -1.0, -3.0]])
        >>> given = LossInputs(logprobs, torch.tensor([[0, 1, 1]]), torch.ones(1), torch.ones(1), old)
        >>> cispo(given, cap=5.0)["advantage"].omega  # e² is capped
        tensor([[ 0., -1., -5.]])

    Source: "MiniMax-M1" (2025, arXiv 2506.13585), without a lower bound; "The art of scaling reinforcement learning
    compute" (2025, arXiv 2510.13786); TRL 1.16's "cispo".
    """
    check_setting("cap", cap, cap > 0, "a number > 0, the largest ratio")
    mask, logprobs, old, A, w = read(inputs, "cispo", "logprobs", "old", "advantages", "weights")
    return {"advantage": term_of(mask, -w * A * ratio_of(logprobs, old, mask, level, cap))}


def vespo(
    inputs: LossInputs,
    positive: tuple[float, float] = (2.0, 3.0),
    negative: tuple[float, float] = (3.0, 2.0),
    correction: Tensor | None = None,
) -> dict[str, LossTerm]:
    """Compute ω of VESPO, which weighs a sequence by a gamma density of its ratio, held constant.

    W_u = Π_t r_ut,  φ(W) = W^k exp(λ (1 − W)),  (k, λ) by the advantage's sign
    L = −Σ_ut w_ut φ(W_u) A_ut ℓ_ut,  ω_ut = −w_ut φ(W_u) A_ut

    W is a product over tokens, and no mean as in GSPO. As in TRL, log r is held within ±20, log W in [log 1e-8, 20],
    and λ at 1e-4 or more.

    Args:
        inputs: with advantages, weights and old.
        positive: (k, λ) of advantages ≥ 0; TRL's vespo_k_pos, vespo_lambda_pos.
        negative: (k, λ) of advantages below 0; TRL's vespo_k_neg, vespo_lambda_neg.
        correction: [n t], `truncated_importance` or `masked_importance` of tokens, which VESPO multiplies into W and
            not into the advantage; a masked token counts as 1e-8.

    Returns:
        {"advantage": ω [n t]}.

    Raises:
        ModelError: k or λ is negative or infinite.
        BatchError, NonFiniteError: as in `clipped_ratio`; a correction of another shape, or NaN.

    Example:
        >>> logprobs, old = torch.tensor([[0.0, -1.0, -1.0]]), torch.tensor([[0.0, -1.0, -1.5]])
        >>> given = LossInputs(logprobs, torch.tensor([[0, 1, 1]]), torch.ones(1), torch.ones(1), old)
        >>> vespo(given)["advantage"].omega
        tensor([[ 0.0000, -0.3882, -0.3882]])

    Source: "VESPO: variational sequence-level soft policy optimization" (2026, arXiv 2602.10693); TRL 1.16's "vespo".
    """
    for side, pair in (("positive", positive), ("negative", negative)):
        for name, value in zip(("k", "λ"), pair, strict=True):
            check_setting(f"{name} of {side}", value, 0 <= value < torch.inf, "a finite number ≥ 0")
    mask, logprobs, old, A, w = read(inputs, "vespo", "logprobs", "old", "advantages", "weights")
    log_w = (logprobs - old).clamp(-20.0, 20.0).sum(1, keepdim=True)
    if correction is not None:
        factor = factor_of(correction, inputs, mask, "correction")
        log_w = log_w + torch.where(mask, factor.log().clamp(_SMALLEST, _LARGEST), 0.0).sum(1, keepdim=True)
    log_w = log_w.clamp(_SMALLEST, _LARGEST)
    k, decay = (
        torch.where(A >= 0, A.new_tensor(up), A.new_tensor(down)) for up, down in zip(positive, negative, strict=True)
    )
    decay = decay.clamp(min=1e-4)
    return {"advantage": term_of(mask, -w * A * (decay * (1 - log_w.exp()) + k * log_w).exp())}


def cross_entropy(inputs: LossInputs) -> dict[str, LossTerm]:
    """Compute ω of supervised fine-tuning.

    L = −Σ_ut w_ut ℓ_ut,  ω_ut = −w_ut, with w = 1/(scored tokens of all micro-batches of the step) in TRL

    Args:
        inputs: with weights; `response_mask` marks the tokens whose labels are not −100.

    Returns:
        {"cross_entropy": ω [n t]}.

    Raises:
        BatchError, NonFiniteError: as in `policy_gradient`.

    Example:
        >>> mask = torch.tensor([[0, 1, 1], [0, 1, 0]])
        >>> given = LossInputs(torch.zeros(2, 3), mask, weights=torch.full((2,), 1 / 4))
        >>> cross_entropy(given)["cross_entropy"].omega
        tensor([[ 0.0000, -0.2500, -0.2500],
                [ 0.0000, -0.2500,  0.0000]])

    Source: TRL 1.16's SFTTrainer, loss_type="nll".
    """
    mask, w = read(inputs, "cross_entropy", "weights")
    return {"cross_entropy": term_of(mask, -w)}
