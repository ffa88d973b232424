"""All analyses that a plan asks for: those of a request, some of which take rows as they come, and those of U.

One that fails is skipped, and the others are answered; see `fkernel.study.analyses.failures`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from fkernel.engine import KernelBlock
from fkernel.func.handles import ProductSpec
from fkernel.study.analyses.analysis import Accumulator
from fkernel.study.analyses.context import RequestContext, UpdateContext
from fkernel.study.analyses.failures import tried
from fkernel.study.analyses.registry import ANALYSES, UPDATE_ANALYSES, AnalysesPlan, RequestAnalyses, spec_of
from fkernel.study.outcome import AnalysisResult


class AnalysisRunner:
    """What is asked of a request beside its effects, while it is being answered."""

    def __init__(self, plan: RequestAnalyses, context: RequestContext) -> None:
        """Begin all that is asked; what the plan names and is not there is an error now, and not after all rows."""
        self.context = context
        self.spec = {name: (analysis, config) for name, analysis, config in spec_of(plan, ANALYSES)}
        for analysis, config in self.spec.values():
            if analysis.check is not None:
                analysis.check(context, config)
        self.accumulators = {
            name: analysis.accumulator(context, config)
            for name, (analysis, config) in self.spec.items()
            if analysis.accumulator is not None
        }
        self.skipped: dict[str, AnalysisResult] = {}

    def ask(self, walk: ProductSpec) -> ProductSpec:
        """Add what the analyses of rows ask of the walk; one that cannot say it is skipped."""
        for name, accumulator in self._accumulating():
            more = self._tried(name, partial(accumulator.ask, walk))
            walk = walk if name in self.skipped else more
        return walk

    def add(self, block: KernelBlock) -> None:
        """Take some rows; what fails takes no more of them."""
        for name, accumulator in self._accumulating():
            self._tried(name, partial(accumulator.add, block))

    def results(self) -> dict[str, AnalysisResult]:
        """Make everything that was asked; what lacks something says what."""
        return {name: self.skipped.get(name) or self._result(name) for name in self.spec}

    def _accumulating(self) -> Iterator[tuple[str, Accumulator]]:
        return ((name, one) for name, one in self.accumulators.items() if name not in self.skipped)

    def _result(self, name: str) -> AnalysisResult:
        analysis, config = self.spec[name]
        if name in self.accumulators:
            made: AnalysisResult = self._tried(name, self.accumulators[name].result)
        else:
            assert analysis.compute is not None
            made = self._tried(name, partial(analysis.compute, self.context, config))
        return self.skipped.get(name, made)

    def _tried(self, name: str, do: Callable[[], Any]) -> Any:
        """Do a part of one analysis; where it fails, record why the analysis is skipped."""
        ids = None if self.spec[name][0].own_rows else self.context.batch.ids
        made, skipped = tried(name, "the request's", do, ids)
        if skipped is not None:
            self.skipped[name] = skipped
        return made


def update_results(plan: AnalysesPlan, context: UpdateContext) -> dict[str, AnalysisResult]:
    """Make the analyses of U that a plan asks for.

    Raises:
        PlanError: something is asked for that there is not.
    """
    results = dict[str, AnalysisResult]()
    for name, analysis, config in spec_of(plan, UPDATE_ANALYSES):
        assert analysis.compute is not None
        make = partial(analysis.compute, context, config)
        made, skipped = tried(name, "the update batch's", make, context.workspace.batch.ids)
        results[name] = skipped or made
    return results
