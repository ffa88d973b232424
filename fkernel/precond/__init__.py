"""Pure linear maps on parameter space, and AdamW's among them. Never looks at a model or a batch."""

from fkernel.precond.adam import AdamWStep, adam, adamw_response, adamw_step, gradient_rates
from fkernel.precond.alternatives import alternatives
from fkernel.precond.clipping import clip_factor, clip_gradient
from fkernel.precond.linearized import Update, broyden, linearized, partition, secant
from fkernel.precond.state import AdamWState, adamw_init
from fkernel.precond.transform import Diagonal, Preconditioner, chain, diagonal, identity, select

__all__ = [
    "AdamWState",
    "AdamWStep",
    "Diagonal",
    "Preconditioner",
    "Update",
    "adam",
    "adamw_init",
    "adamw_response",
    "adamw_step",
    "alternatives",
    "broyden",
    "chain",
    "clip_factor",
    "clip_gradient",
    "diagonal",
    "gradient_rates",
    "identity",
    "linearized",
    "partition",
    "secant",
    "select",
]
