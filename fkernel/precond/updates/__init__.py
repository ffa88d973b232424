"""Optimizers as pure functions of the gradient, F: (h, state) → Δθ, and their states, keyed by parameter name.

`OPTIMIZERS` lists them. h is the gradient as the rule is given it: ±g + λθ where the optimizer climbs, or adds its
decay to the gradient; decoupled decay does not depend on g and is left out. `fkernel.precond.optimizer_step` makes h,
takes the step apart and adds decay. Each rule is what the optimizer executes, in real numbers. Where v' = 0, which is a
coordinate that never had a gradient, √v' is differentiated as the constant that it is for a gradient that stays 0.
"""

from fkernel.precond.updates.adaptive_moments import (
    AdamState,
    NAdamState,
    RAdamState,
    adam,
    adamw,
    nadam,
    radam,
)
from fkernel.precond.updates.coordinates import (
    AdagradState,
    LionState,
    RMSpropState,
    SGDState,
    adagrad,
    lion,
    rmsprop,
    sgd,
)
from fkernel.precond.updates.factored import (
    AdafactorState,
    TransformersAdafactorState,
    adafactor,
    transformers_adafactor,
)
from fkernel.precond.updates.known import OPTIMIZERS, Optimizer, kind_of, optimizer_of
from fkernel.precond.updates.orthogonal import MuonState, muon

__all__ = [
    "OPTIMIZERS",
    "AdafactorState",
    "AdagradState",
    "AdamState",
    "LionState",
    "MuonState",
    "NAdamState",
    "Optimizer",
    "RAdamState",
    "RMSpropState",
    "SGDState",
    "TransformersAdafactorState",
    "adafactor",
    "adagrad",
    "adam",
    "adamw",
    "kind_of",
    "lion",
    "muon",
    "nadam",
    "optimizer_of",
    "radam",
    "rmsprop",
    "sgd",
    "transformers_adafactor",
]
