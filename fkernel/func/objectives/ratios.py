"""The ratio of the policy at θ to the one that sampled, of tokens or of sequences, and the derivative through it.

With |u| the number of u's response tokens,

    level "token"      r_ut = exp(ℓ_ut − ℓ_old,ut)                       ∂r_ut/∂ℓ_ut = r_ut
    level "sequence"   s_u  = exp((1/|u|) Σ_t (ℓ_ut − ℓ_old,ut))         ∂s_u/∂ℓ_ut = s_u/|u|, for every t of u

So a loss Σ_ut w_ut F_ut(r_ut) has ω_ut = w_ut F′_ut r_ut, and with the sequence's ratio in place of every token's

    ω_ut = (1/|u|) Σ_t′ w_ut′ F′_ut′(s_u) s_u

the same for all tokens of u: what differs between tokens (advantages, factors, weights) counts by its mean.
"""

from __future__ import annotations

import math

from fkernel.errors import ModelError
from fkernel.func.objectives.inputs import SAME_TOKENS, check_finite
from fkernel.shapes import Tensor

LEVELS = ("token", "sequence")


def ratio_of(logprobs: Tensor, old: Tensor, mask: Tensor, level: str, cap: float = math.inf) -> Tensor:
    """Compute r, or s for every token of its sequence; all [n t], and 1 outside of the response.

    Args:
        logprobs: ℓ, [n t].
        old: ℓ_old, [n t]; both 0 outside of the response.
        mask: of the response, [n t] bool.
        level: "token" or "sequence".
        cap: the largest ratio, for losses that hold it constant.

    Raises:
        ModelError: the level is neither "token" nor "sequence".
        NonFiniteError: a ratio overflows and is not capped. Where a loss is differentiated through it the trainer's own
            gradient was NaN there, clipped or not: 0 · ∞.
    """
    if level not in LEVELS:
        raise ModelError(f"level is {level!r}; expected 'token' or 'sequence': whose ratio it is.")
    log_ratio = logprobs - old
    ratio = (log_ratio if level == "token" else mean_over_response(log_ratio, mask)).exp().clamp(max=cap)
    check_finite(ratio, "exp(logprobs − old)", SAME_TOKENS)
    return ratio


def through_ratio(slopes: Tensor, mask: Tensor, level: str) -> Tensor:
    """Turn w F′ r, [n t], into ω, [n t]: the derivative at the tokens that the ratio was made of."""
    return slopes if level == "token" else mean_over_response(slopes, mask)


def mean_over_response(values: Tensor, mask: Tensor) -> Tensor:
    """Average values that are 0 outside of the response over it; [n t], the mean at each of its tokens."""
    count = mask.sum(1, keepdim=True).clamp(min=1)
    return values.sum(1, keepdim=True) / count * mask
