"""What stands beside the advantage's part of a loss: divergence from a reference policy, and the entropy bonus."""

from __future__ import annotations

import math

import torch

from fkernel.func.objectives.factors import factor_of
from fkernel.func.objectives.inputs import SAME_TOKENS, LossInputs, check_finite, check_setting, read
from fkernel.func.objectives.ratios import ratio_of, through_ratio
from fkernel.func.objectives.terms import LossTerm, term_of
from fkernel.shapes import Tensor


def kl_penalty(inputs: LossInputs, beta: float) -> dict[str, LossTerm]:
    """Compute ω of the penalty on the divergence from a reference policy, by the estimator k3 of GRPO.

    L = β Σ_ut w_ut (exp(d_ut) − d_ut − 1),  d_ut = ℓ_ref,ut − ℓ_ut
    ω_ut = −β w_ut (exp(d_ut) − 1): it raises the tokens that the reference finds likelier, and lowers the others

    TRL's default is `corrected_kl_penalty`.

    Args:
        inputs: with weights and reference.
        beta: β > 0; TRL's beta.

    Returns:
        {"kl": ω [n t]}.

    Raises:
        ModelError: β is not a positive number.
        BatchError: a field is missing, of another shape, or a weight is negative.
        NonFiniteError: a number of a response token is NaN or infinite, or an exponential overflows.

    Example:
        >>> logprobs, reference = torch.tensor([[0.0, -2.0, -1.0]]), torch.tensor([[0.0, -1.0, -2.0]])
        >>> mask = torch.tensor([[0, 1, 1]])
        >>> given = LossInputs(logprobs, mask, weights=torch.ones(1), reference=reference)
        >>> kl_penalty(given, beta=0.1)["kl"].omega
        tensor([[ 0.0000, -0.1718,  0.0632]])

    Source: J. Schulman, "Approximating KL divergence" (2020), k3; Z. Shao et al., "DeepSeekMath" (2024), eq. 4; TRL
    1.16's use_bias_correction_kl=False.
    """
    _check_beta(beta)
    mask, logprobs, reference, w = read(inputs, "kl_penalty", "logprobs", "reference", "weights")
    return {"kl": term_of(mask, -beta * w * _excess(reference - logprobs))}


def corrected_kl_penalty(inputs: LossInputs, beta: float, level: str = "token") -> dict[str, LossTerm]:
    """Compute ω of the penalty by k3 times the ratio: its mean gradient is the divergence's, off policy too.

    L = β Σ_ut w_ut r_ut k_ut,  k_ut = exp(d_ut) − d_ut − 1,  d_ut = ℓ_ref,ut − ℓ_ut
    ω_ut = β w_ut r_ut (k_ut − (exp(d_ut) − 1)) = −β w_ut r_ut d_ut

    With a sequence's ratio s_u in place of r_ut its derivative reaches all tokens of u, as it does in TRL:

    ω_ut = −β w_ut s_u (exp(d_ut) − 1) + (β s_u/|u|) Σ_t′ w_ut′ k_ut′

    It differs from `kl_penalty` also at r = 1, for the ratio has a derivative. TRL's default.

    Args:
        inputs: with weights, old and reference.
        beta: β > 0; TRL's beta.
        level: "token" or "sequence", whose ratio it is; TRL's importance_sampling_level.

    Returns:
        {"kl": ω [n t]}.

    Raises:
        ModelError, BatchError, NonFiniteError: as in `kl_penalty` and `clipped_ratio`.

    Example:
        >>> logprobs, reference = torch.tensor([[0.0, -2.0, -1.0]]), torch.tensor([[0.0, -1.0, -2.0]])
        >>> mask = torch.tensor([[0, 1, 1]])
        >>> given = LossInputs(logprobs, mask, weights=torch.ones(1), old=logprobs, reference=reference)
        >>> corrected_kl_penalty(given, beta=0.1)["kl"].omega
        tensor([[ 0.0000, -0.1000,  0.1000]])

    Source: DeepSeek-AI, "DeepSeek-V3.2" (2025), its correction; TRL 1.16's use_bias_correction_kl=True.
    """
    _check_beta(beta)
    names = ("logprobs", "old", "reference", "weights")
    mask, logprobs, old, reference, w = read(inputs, "corrected_kl_penalty", *names)
    r, d = ratio_of(logprobs, old, mask, level), reference - logprobs
    excess = _excess(d)
    if level == "token":
        return {"kl": term_of(mask, -beta * w * r * d)}
    by_ratio = through_ratio(w * r * (excess - d), mask, level)
    return {"kl": term_of(mask, beta * (by_ratio - w * r * excess))}


def entropy_bonus(inputs: LossInputs, coefficient: float, tokens: Tensor | None = None) -> dict[str, LossTerm]:
    """Compute η of the entropy bonus.

    L = −c Σ_ut w_ut m_ut H_ut,  η_ut = −c w_ut m_ut,  ω = 0

    In TRL the bonus is a mean over the tokens that it acts on, whatever the loss divides its other parts by: give it
    w = 1/(Σ m · accumulation) of the micro-batch, `inputs._replace(weights=…)`, and the coefficient as it was applied
    (an adaptive one changes from step to step, and is 0 where the entropy is above its target).

    Args:
        inputs: with weights. Entropies are not needed: the bonus is linear in them.
        coefficient: c; TRL's entropy_coef.
        tokens: m, [n t], such as `high_entropy_mask`; None: all of the response.

    Returns:
        {"entropy": ω = 0, η [n t]}.

    Raises:
        ModelError: the coefficient is not finite.
        BatchError: weights are missing, negative or of another shape, or tokens are not [n t].
        NonFiniteError: a weight is NaN or infinite.

    Example:
        >>> given = LossInputs(torch.zeros(1, 3), torch.tensor([[0, 1, 1]]), weights=torch.tensor([0.5]))
        >>> entropy_bonus(given, 0.01)["entropy"].eta
        tensor([[ 0.0000, -0.0050, -0.0050]])

    Source: V. Mnih et al., "Asynchronous methods for deep reinforcement learning" (2016); TRL 1.16's entropy_coef.
    """
    check_setting("coefficient", coefficient, math.isfinite(coefficient), "a finite number")
    mask, w = read(inputs, "entropy_bonus", "weights")
    m = mask.to(w) if tokens is None else factor_of(tokens, inputs, mask, "tokens")
    return {"entropy": LossTerm(torch.zeros_like(w), torch.where(mask, -coefficient * w * m, 0.0))}


def _check_beta(beta: float) -> None:
    check_setting("beta", beta, 0 < beta < math.inf, "a positive number; leave the penalty out where it is 0")


def _excess(d: Tensor) -> Tensor:
    """Compute exp(d) − 1, accurately where d is small."""
    excess = torch.expm1(d)
    check_finite(excess, "exp(reference − logprobs)", SAME_TOKENS)
    return excess
