"""Pure linear maps on parameter space, and optimizers' steps taken apart. Never looks at a model or a batch."""

from fkernel.precond.adaptive import AdamWStep, Grads, adam, adamw_response, adamw_step, gradient_rates
from fkernel.precond.base import OptimizerState
from fkernel.precond.cancelling import cancellation
from fkernel.precond.clipping import clip_factor, clip_gradient
from fkernel.precond.executed import ExecutedStep, check_masters, executed_step
from fkernel.precond.linearization import Update, broyden, linearized, partition, secant
from fkernel.precond.making import fresh_state, state_from
from fkernel.precond.optimizers import alternatives
from fkernel.precond.state import AdamWState, adamw_init, check_covers
from fkernel.precond.steps import MixedState, acts_by_coordinate, optimizer_step, response
from fkernel.precond.stored import StoredState, exact_state, real_entry, shape_of_entry, stored_state
from fkernel.precond.transform import Diagonal, Preconditioner, chain, diagonal, identity, select

__all__ = [
    "AdamWState",
    "AdamWStep",
    "Diagonal",
    "ExecutedStep",
    "Grads",
    "MixedState",
    "OptimizerState",
    "Preconditioner",
    "StoredState",
    "Update",
    "acts_by_coordinate",
    "adam",
    "adamw_init",
    "adamw_response",
    "adamw_step",
    "alternatives",
    "broyden",
    "cancellation",
    "chain",
    "check_covers",
    "check_masters",
    "clip_factor",
    "clip_gradient",
    "diagonal",
    "exact_state",
    "executed_step",
    "fresh_state",
    "gradient_rates",
    "identity",
    "linearized",
    "optimizer_step",
    "partition",
    "real_entry",
    "response",
    "secant",
    "select",
    "shape_of_entry",
    "state_from",
    "stored_state",
]
