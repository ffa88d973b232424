"""Losses of policies as pure functions: their gradient at every token, in named parts.

A room of its own because losses are many and small, and look at numbers of tokens alone: no model, no parameters. Each
takes `LossInputs` and returns {part: LossTerm}; parts add up to the loss's ω and η (`fkernel.func.objectives.terms`):

    terms = {**clipped_ratio(inputs, 0.2, 0.28), **corrected_kl_penalty(inputs, beta=0.04)}

A loss that is not here is differentiated by `from_autograd`.
"""

from fkernel.func.objectives.drifts import dppo, ipo
from fkernel.func.objectives.factors import (
    high_entropy_mask,
    masked_importance,
    off_policy_mask,
    scale_advantages,
    truncated_importance,
)
from fkernel.func.objectives.inputs import LossInputs
from fkernel.func.objectives.likelihoods import cispo, cross_entropy, policy_gradient, vespo
from fkernel.func.objectives.pairs import preference
from fkernel.func.objectives.penalties import corrected_kl_penalty, entropy_bonus, kl_penalty
from fkernel.func.objectives.surrogates import clipped_ratio, luspo, sapo
from fkernel.func.objectives.terms import LossTerm, from_autograd, total

__all__ = [
    "LossInputs",
    "LossTerm",
    "cispo",
    "clipped_ratio",
    "corrected_kl_penalty",
    "cross_entropy",
    "dppo",
    "entropy_bonus",
    "from_autograd",
    "high_entropy_mask",
    "ipo",
    "kl_penalty",
    "luspo",
    "masked_importance",
    "off_policy_mask",
    "policy_gradient",
    "preference",
    "sapo",
    "scale_advantages",
    "total",
    "truncated_importance",
    "vespo",
]
