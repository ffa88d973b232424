"""The registry of analyses, of requests and of U itself.

Keys are the same in plans, results and reports; the order is that of results. CONTRIBUTING says how to add one.
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
from fkernel.study.config.values import Strict

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
"""Analyses of a request."""
UPDATE_ANALYSES: Mapping[str, Analysis] = MappingProxyType({"health": HEALTH, "structure": STRUCTURE})
"""Analyses of U itself."""


class RequestAnalyses(Strict):
    """The analyses of a request.

    Attributes:
        ledger: the realised change as a sum of terms, with its rounding floor.
        sweep: the step at several sizes, predicted and measured.
        tokens: the change of every token, and of the entropy at its position.
        parts: K·A and norms by layer and by kind of parameter.
        observables: other quantities than log π.
        counterfactuals: steps under other advantages, clipping or learning rate.
        preconditioners: names of `fkernel.precond.alternatives`, compared with the realised change.
        uncertainty: intervals by prompt, and significance of contributors.
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
            names = [config.name for config in getattr(self, what)]
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"two {what} have the name {twice[0]!r}; give each one of its own (name:)")
        return self

    @property
    def of_rows(self) -> bool:
        """Whether an analysis needs rows of K, or the gradients of E."""
        return any(analysis.accumulator is not None for _, analysis, _ in spec_of(self, ANALYSES))


class AnalysesPlan(RequestAnalyses):
    """The default analyses of requests, and the analyses of U itself.

    Attributes:
        health: coordinates with a small or zero second moment, and their share of the kernel's trace.
        structure: principal components, clusters and exemplars of U.
    """

    health: bool = False
    structure: Annotated[StructurePlan | None, Switch] = None


def spec_of(plan: RequestAnalyses, analyses: Mapping[str, Analysis]) -> Iterator[tuple[str, Analysis, Any]]:
    """Yield (name in results, analysis, configuration) for all analyses of a plan."""
    for name, analysis in analyses.items():
        config = getattr(plan, name)
        if analysis.several:
            yield from ((f"{name}.{each.name}", analysis, each) for each in config)
        elif config:
            yield name, analysis, config
