"""The optimizers that are modelled: one row each, and nothing about them anywhere else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from fkernel.errors import OptimizerStateError
from fkernel.precond.base import OptimizerState
from fkernel.precond.linearization import Update
from fkernel.precond.state import AdamWState
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
from fkernel.precond.updates.orthogonal import MuonState, muon

BETAS: dict[str, tuple[str, int | None]] = {"beta1": ("betas", 0), "beta2": ("betas", 1)}


class Optimizer(NamedTuple):
    """One optimizer.

    Attributes:
        state: the class of its states.
        update: its rule, (h, state) → Δθ without decay.
        writer: the class that executes it, where nothing else is known.
        renamed: {field: (setting, place in it)} where a parameter group has it otherwise.
        coordinatewise: whether a coordinate's move depends on its own h alone.
    """

    state: type[Any]
    update: Update
    writer: str
    renamed: Mapping[str, tuple[str, int | None]] = {}
    coordinatewise: bool = True

    @property
    def numbers(self) -> list[str]:
        """Fields that are counted for each parameter, beside its moments."""
        return [each.name for each in fields(self.state) if each.name in ("step", "mu_product")]

    @property
    def settings(self) -> dict[str, tuple[str, int | None]]:
        """{field: (name in a parameter group, place in it)}."""
        other = {*self.state.MOMENTS, *self.state.OPTIONAL, *self.numbers, "scale", "width"}
        own = [each.name for each in fields(self.state) if each.name not in other]
        return {name: self.renamed.get(name, (name, None)) for name in own}


MATRICES: dict[str, tuple[str, int | None]] = {"coefficients": ("ns_coefficients", None), "steps": ("ns_steps", None)}

OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(AdamWState, adamw, "torch.optim.AdamW", BETAS),
    "adam": Optimizer(AdamState, adam, "torch.optim.Adam", BETAS),
    "nadam": Optimizer(NAdamState, nadam, "torch.optim.NAdam", BETAS),
    "radam": Optimizer(RAdamState, radam, "torch.optim.RAdam", BETAS),
    "sgd": Optimizer(SGDState, sgd, "torch.optim.SGD"),
    "rmsprop": Optimizer(RMSpropState, rmsprop, "torch.optim.RMSprop"),
    "adagrad": Optimizer(AdagradState, adagrad, "torch.optim.Adagrad"),
    "lion": Optimizer(LionState, lion, "bitsandbytes.optim.Lion", BETAS),
    "adafactor": Optimizer(
        AdafactorState, adafactor, "torch.optim.Adafactor", {"eps1": ("eps", 0), "eps2": ("eps", 1)}, False
    ),
    "transformers_adafactor": Optimizer(
        TransformersAdafactorState, transformers_adafactor, "transformers.Adafactor", {}, False
    ),
    "muon": Optimizer(MuonState, muon, "torch.optim.Muon", MATRICES, False),
}
"""{kind: how it steps}."""


def optimizer_of(state: OptimizerState) -> Optimizer:
    """Find a state's optimizer.

    Raises:
        OptimizerStateError: it is of none that is known.

    Example:
        >>> optimizer_of(LionState({})).writer
        'bitsandbytes.optim.Lion'
    """
    for optimizer in OPTIMIZERS.values():
        if type(state) is optimizer.state:
            return optimizer
    raise OptimizerStateError(
        f"The optimizer state is a {type(state).__name__}; expected that of one of {', '.join(OPTIMIZERS)}, as "
        f"fkernel.checkpoint.optimizer_state and fkernel.precond.fresh_state make them."
    )


def kind_of(state: OptimizerState) -> str:
    """Name a state's optimizer, as `OPTIMIZERS` does.

    Example:
        >>> kind_of(LionState({}))
        'lion'
    """
    rule = optimizer_of(state)
    return next(kind for kind, each in OPTIMIZERS.items() if each is rule)
