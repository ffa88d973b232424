"""Run the analyses of a plan: those of a request, some of them on blocks of rows, and those of U.

One that fails is skipped; see `fkernel.study.analyses.failures`.
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
from fkernel.study.log import doing
from fkernel.study.outcome import AnalysisResult


class AnalysisRunner:
    """Runs the analyses of one request."""

    def __init__(self, plan: RequestAnalyses, context: RequestContext) -> None:
        """Create all accumulators; unknown names in the plan raise here, before any row is computed."""
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
        """Add the accumulators' products; one that fails is skipped."""
        for name, accumulator in self._accumulating():
            extended = self._tried(name, partial(accumulator.ask, walk))
            walk = walk if name in self.skipped else extended
        return walk

    def add(self, block: KernelBlock) -> None:
        """Pass a block to the accumulators; one that fails is skipped from then on."""
        for name, accumulator in self._accumulating():
            self._tried(name, partial(accumulator.add, block))

    def results(self) -> dict[str, AnalysisResult]:
        """The results of all analyses, skipped ones included."""
        results = {}
        for name in self.spec:
            with doing(f"analysis {name}"):
                results[name] = self.skipped.get(name) or self._result(name)
        return results

    def _accumulating(self) -> Iterator[tuple[str, Accumulator]]:
        return ((name, a) for name, a in self.accumulators.items() if name not in self.skipped)

    def _result(self, name: str) -> AnalysisResult:
        analysis, config = self.spec[name]
        if name in self.accumulators:
            result: AnalysisResult = self._tried(name, self.accumulators[name].result)
        else:
            assert analysis.compute is not None
            result = self._tried(name, partial(analysis.compute, self.context, config))
        return self.skipped.get(name, result)

    def _tried(self, name: str, do: Callable[[], Any]) -> Any:
        """Run a part of one analysis; where it fails, record the reason."""
        ids = None if self.spec[name][0].own_rows else self.context.batch.ids
        result, skipped = tried(name, "the request's", do, ids)
        if skipped is not None:
            self.skipped[name] = skipped
        return result


def update_results(plan: AnalysesPlan, context: UpdateContext) -> dict[str, AnalysisResult]:
    """Run the analyses of U that a plan asks for.

    Raises:
        PlanError: as an analysis raises it.
    """
    results = dict[str, AnalysisResult]()
    for name, analysis, config in spec_of(plan, UPDATE_ANALYSES):
        assert analysis.compute is not None
        make = partial(analysis.compute, context, config)
        with doing(f"analysis {name}"):
            result, skipped = tried(name, "the update batch's", make, context.workspace.batch.ids)
        results[name] = skipped or result
    return results
