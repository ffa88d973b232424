"""prime-rl's losses: the ratio itself, without clipping, where the token's probability has not drifted too far.

    d_ut = ℓ_ut − ℓ_old,ut,   r_ut = exp(d_ut),   m_ut = 1 where π_ut − π_old,ut is within bounds, 0 elsewhere
    L = −Σ_ut w_ut m_ut A_ut r_ut + κ Σ_ut w_ut d_ut²
    ω_ut = −w_ut m_ut A_ut r_ut,  and 2 κ w_ut d_ut

ℓ_old is the sampling engine's there. The bounds are of probabilities, not of their ratio: a rare token may become ten
times as likely.
"""

from __future__ import annotations

import torch

from fkernel.func.objectives.inputs import LossInputs, check_setting, read
from fkernel.func.objectives.ratios import ratio_of
from fkernel.func.objectives.terms import LossTerm, term_of
from fkernel.shapes import Tensor


def dppo(inputs: LossInputs, low: float = 0.2, high: float = 0.2, kl: float = 1e-3) -> dict[str, LossTerm]:
    """Compute ω of DPPO with a squared log-ratio beside it: prime-rl's default loss.

    m_ut = 0 where A_ut > 0 and π − π_old > high, and where A_ut < 0 and π_old − π > low

    Args:
        inputs: with advantages, weights and old.
        low: ≥ 0, how far the probability of a token that is lowered may have fallen; prime-rl's dppo_mask_low.
        high: ≥ 0, how far that of one that is raised may have risen; prime-rl's dppo_mask_high.
        kl: κ ≥ 0; prime-rl's kl_tau. Its adv_tau multiplies advantages.

    Returns:
        {"advantage": ω [n t], "kl": ω [n t]}.

    Raises:
        ModelError: a setting is out of its range.
        BatchError: a field is missing, of another shape, or a weight is negative.
        NonFiniteError: a number of a response token is NaN or infinite, or a ratio overflows.

    Example:
        >>> logprobs, old = torch.tensor([[0.0, -0.5, -1.0]]), torch.tensor([[0.0, -1.5, -1.1]])
        >>> given = LossInputs(logprobs, torch.tensor([[0, 1, 1]]), torch.ones(1), torch.ones(1), old)
        >>> terms = dppo(given)
        >>> terms["advantage"].omega, terms["kl"].omega  # the first token has risen by 0.38
        (tensor([[ 0.0000,  0.0000, -1.1052]]), tensor([[0.0000, 0.0020, 0.0002]]))

    Source: "DPPO" (2026, arXiv 2602.04879), its binary total variation; "Kimi K2.5" (2026, arXiv 2602.02276), for the
    penalty; prime-rl after 0.8, trainer/rl/loss.py, `default_loss_fn`.
    """
    check_setting("low", low, low >= 0, "a number ≥ 0, a difference of probabilities")
    check_setting("high", high, high >= 0, "a number ≥ 0, a difference of probabilities")
    mask, logprobs, old, A, w = read(inputs, "dppo", "logprobs", "old", "advantages", "weights")
    risen = logprobs.exp() - old.exp()
    return _terms(mask, logprobs, old, A, w, torch.where(A > 0, risen <= high, risen >= -low), kl)


def ipo(inputs: LossInputs, threshold: float = 0.1, kl: float = 1e-3) -> dict[str, LossTerm]:
    """Compute ω of prime-rl's "ipo": as `dppo`, but for bounds that are the same for all tokens.

    m_ut = 0 where |π − π_old| > threshold

    Args:
        inputs: with advantages, weights and old.
        threshold: ≥ 0; prime-rl's ipo_threshold.
        kl: κ ≥ 0; prime-rl's kl_tau.

    Returns:
        {"advantage": ω [n t], "kl": ω [n t]}.

    Raises:
        ModelError, BatchError, NonFiniteError: as in `dppo`.

    Example:
        >>> logprobs, old = torch.tensor([[0.0, -0.5, -1.0]]), torch.tensor([[0.0, -1.5, -1.1]])
        >>> given = LossInputs(logprobs, torch.tensor([[0, 1, 1]]), -torch.ones(1), torch.ones(1), old)
        >>> ipo(given)["advantage"].omega
        tensor([[0.0000, 0.0000, 1.1052]])

    Source: prime-rl after 0.8, trainer/rl/loss.py, `ipo_loss_fn`.
    """
    check_setting("threshold", threshold, threshold >= 0, "a number ≥ 0, a difference of probabilities")
    mask, logprobs, old, A, w = read(inputs, "ipo", "logprobs", "old", "advantages", "weights")
    return _terms(mask, logprobs, old, A, w, (logprobs.exp() - old.exp()).abs() <= threshold, kl)


def _terms(
    mask: Tensor, logprobs: Tensor, old: Tensor, A: Tensor, w: Tensor, kept: Tensor, kl: float
) -> dict[str, LossTerm]:
    check_setting("kl", kl, 0 <= kl < torch.inf, "a number ≥ 0")
    r = ratio_of(logprobs, old, mask, "token")
    advantage = torch.where(kept, -w * A * r, 0.0)
    return {"advantage": term_of(mask, advantage), "kl": term_of(mask, 2 * kl * w * (logprobs - old))}
