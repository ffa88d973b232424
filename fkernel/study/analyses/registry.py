"""All analyses: what a plan may ask of a request and of U itself, a key each, and what answers it.

A key is the same in a plan, in results and in the report; the order here is that of results. CONTRIBUTING says how to
add one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import model_validator

from fkernel.study.analyses.analysis import Analysis, Switch
from fkernel.study.analyses.counterfactuals import COUNTERFACTUALS, CounterfactualPlan
from fkernel.study.analyses.covariates import COVARIATES
from fkernel.study.analyses.health import HEALTH
from fkernel.study.analyses.ledger import LEDGER
from fkernel.study.analyses.observables import OBSERVABLES, ObservablePlan
from fkernel.study.analyses.parts import PARTS
from fkernel.study.analyses.preconditioners import PRECONDITIONERS, PreconditionerName
from fkernel.study.analyses.structure import STRUCTURE, StructurePlan
from fkernel.study.analyses.sweep import SWEEP, SweepPlan
from fkernel.study.analyses.tokens import TOKENS, TokensPlan
from fkernel.study.analyses.uncertainty import UNCERTAINTY, UncertaintyPlan
from fkernel.study.config.base import Strict

ANALYSES: Mapping[str, Analysis] = MappingProxyType({
    "ledger": LEDGER,
    "sweep": SWEEP,
    "tokens": TOKENS,
    "parts": PARTS,
    "observables": OBSERVABLES,
    "counterfactuals": COUNTERFACTUALS,
    "preconditioners": PRECONDITIONERS,
    "uncertainty": UNCERTAINTY,
    "covariates": COVARIATES,
})  # fmt: skip
"""Of a request."""
UPDATE_ANALYSES: Mapping[str, Analysis] = MappingProxyType({"health": HEALTH, "structure": STRUCTURE})
"""Of U itself."""


class RequestAnalyses(Strict):
    """What is asked of a request beside its effects.

    Attributes:
        ledger: the change as a sum that closes, with its rounding floor.
        sweep: the step at several sizes, predicted and taken.
        tokens: the change of every token, and of the entropy where it was drawn.
        parts: K·A and norms by layer and by kind of parameter.
        observables: other quantities than log π.
        counterfactuals: steps that were not taken.
        preconditioners: names of `fkernel.precond.alternatives`, whose influences are held against the realised change.
        uncertainty: intervals by prompt, and which contributors could be chance.
        covariates: correlation of the change with length, entropy, reward and log-probability.
    """

    ledger: bool = False
    sweep: Annotated[SweepPlan | None, Switch] = None
    tokens: Annotated[TokensPlan | None, Switch] = None
    parts: bool = False
    observables: tuple[ObservablePlan, ...] = ()
    counterfactuals: tuple[CounterfactualPlan, ...] = ()
    preconditioners: tuple[PreconditionerName, ...] = ()
    uncertainty: Annotated[UncertaintyPlan | None, Switch] = None
    covariates: bool = False

    @model_validator(mode="after")
    def _named(self) -> RequestAnalyses:
        for what in (name for name, analysis in ANALYSES.items() if analysis.several):
            names = [one.name for one in getattr(self, what)]
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"two {what} have the name {twice[0]!r}; give each one of its own (name:)")
        return self

    @property
    def of_rows(self) -> bool:
        """Whether something is asked that needs rows of K, or the gradients of E."""
        return any(analysis.accumulator is not None for _, analysis, _ in spec_of(self, ANALYSES))


class AnalysesPlan(RequestAnalyses):
    """The same for all requests that do not say; and what is asked of U itself.

    Attributes:
        health: what P rests on: coordinates that were never seen, and how much of the kernel's trace they carry.
        structure: principal components, clusters and exemplars of U.
    """

    health: bool = False
    structure: Annotated[StructurePlan | None, Switch] = None


def spec_of(plan: RequestAnalyses, analyses: Mapping[str, Analysis]) -> Iterator[tuple[str, Analysis, Any]]:
    """Yield (what results call it, the analysis, its configuration) of all that a plan asks for."""
    for name, analysis in analyses.items():
        config = getattr(plan, name)
        if analysis.several:
            yield from ((f"{name}.{one.name}", analysis, one) for one in config)
        elif config:
            yield name, analysis, config
