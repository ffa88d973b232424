"""Pure linear maps on parameter space, and AdamW's among them. Never looks at a model or a batch."""

from fkernel.precond.adaptive import AdamWStep, Grads, adam, adamw_response, adamw_step, gradient_rates
from fkernel.precond.clipping import clip_factor, clip_gradient
from fkernel.precond.linearization import Update, broyden, linearized, partition, secant
from fkernel.precond.optimizers import alternatives
from fkernel.precond.state import AdamWState, adamw_init, check_covers
from fkernel.precond.transform import Diagonal, Preconditioner, chain, diagonal, identity, select

__all__ = [
    "AdamWState",
    "AdamWStep",
    "Diagonal",
    "Grads",
    "Preconditioner",
    "Update",
    "adam",
    "adamw_init",
    "adamw_response",
    "adamw_step",
    "alternatives",
    "broyden",
    "chain",
    "check_covers",
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
