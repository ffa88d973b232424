"""K·A, contributions and norms of a request by layer and by kind of parameter."""

from __future__ import annotations

from typing import Any

import torch

from fkernel.analysis import by_part, missed, shares, summed
from fkernel.engine import KernelBlock
from fkernel.func import by_kind, by_layer
from fkernel.func.handles import ProductSpec
from fkernel.shapes import Tensor
from fkernel.study.analyses.analysis import Accumulator, Analysis, without_nan
from fkernel.study.analyses.context import RequestContext
from fkernel.study.outcome import AnalysisResult


class PartsAccumulator(Accumulator):
    """K·A, contributions and norms by layer and by kind of parameter."""

    def __init__(self, context: RequestContext, config: bool = True) -> None:
        """Start with no groups."""
        self.context, self.names = context, [*context.policy.params]
        self.sums: dict[str, dict[str, Tensor]] = {"kind": {}, "layer": {}}
        self.norms: dict[str, dict[str, Tensor]] = {"kind": {}, "layer": {}}
        self.contributions: dict[str, dict[str, Tensor]] = {"kind": {}, "layer": {}}

    def ask(self, walk: ProductSpec) -> ProductSpec:
        """Split every sum by part."""
        return walk._replace(key=by_part)

    def add(self, block: KernelBlock) -> None:
        """Add a block of rows."""
        context, n = self.context, len(self.context.batch)
        for view, key in (("kind", by_kind), ("layer", by_layer)):
            for group, K in summed(block.parts(), self.names, key).items():
                C = (K.to(context.dtype) * context.weights.to(context.dtype)).double()
                _into(self.sums[view], group, n)[block.at] = C.sum(1)
                if context.capture.kernel:
                    _into(self.contributions[view], group, n, C.shape[1])[block.at] = C
            for group, plain in summed(block.row_parts("squared_norms"), self.names, key).items():
                _into(self.norms[view], group, n)[block.at] = plain

    def result(self) -> AnalysisResult:
        """Stack the groups along axis 0."""
        arrays: dict[str, Any] = {}
        facts: dict[str, Any] = {}
        for view in ("kind", "layer"):
            facts[f"{view}s"] = [*self.sums[view]]
            facts[f"{view}_shares"] = shares(self.sums[view])
            facts[f"{view}_norm_shares"] = shares(self.norms[view])
            stored = (("batch", self.sums), ("squared_norms", self.norms), ("contributions", self.contributions))
            for name, table in stored:
                if table[view]:
                    arrays[f"{view}_{name}"] = torch.stack([*table[view].values()]).numpy()
        facts |= without_nan({"missed": missed(self.sums["kind"])})
        return AnalysisResult(arrays, facts)


def _into(table: dict[str, Tensor], group: str, *shape: int) -> Tensor:
    if group not in table:
        table[group] = torch.zeros(*shape, dtype=torch.float64)
    return table[group]


PARTS = Analysis(
    tuple(f"{view}_{name}" for view in ("kind", "layer") for name in ("batch", "squared_norms", "contributions")),
    accumulator=PartsAccumulator,
)
