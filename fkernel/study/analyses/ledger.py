"""The ledger of a request: the change as a sum that closes, with the rounding in it."""

from __future__ import annotations

import torch

from fkernel.analysis import Ledger, floor_from, ledger
from fkernel.engine import KernelBlock
from fkernel.func.handles import ProductSpec
from fkernel.study.analyses.analysis import Accumulator, Analysis, without_nan
from fkernel.study.analyses.context import RequestContext
from fkernel.study.outcome import AnalysisResult


class LedgerAccumulator(Accumulator):
    """The rounding in every realised change, Σ_α (θ_α ∂_α S_e)², is one more sum of squares of the walk."""

    def __init__(self, context: RequestContext, config: bool = True) -> None:
        """Begin with nothing."""
        self.context, self.floor = context, torch.zeros(len(context.batch), dtype=torch.float64)

    def ask(self, walk: ProductSpec) -> ProductSpec:
        """Ask for Σ_α θ_α² g_eα²."""
        floor = {name: leaf.square() for name, leaf in self.context.policy.params.items()}
        return walk._replace(x=walk.x._replace(squares={**walk.x.squares, "floor": floor}))

    def add(self, block: KernelBlock) -> None:
        """Take some rows."""
        self.floor[block.at] = floor_from(block.rows("floor"), self.context.before[block.at].cpu(), self.context.dtype)

    def result(self) -> AnalysisResult:
        """Make the ledger of every sequence; facts are of the whole request.

        A penalty is clipped with the batch's part. What parameters did that are not selected is a line of its own, and
        errors are of what the selected ones did.
        """
        context = self.context
        parts = {name: context.effect(name).double().cpu() for name in ("momentum", "decay", "realised")}
        rest = {name: context.effects[name].double().cpu() for name in ("unselected",) if name in context.effects}
        whole = parts["realised"]
        parts["realised"] = whole - sum(rest.values())
        batch = context.effects["batch"].double().cpu()
        if "penalty" in context.effects:
            batch = batch + context.effects["penalty"].to(batch)
        entries = ledger(**parts, batch=batch, floor=self.floor, clip=context.workspace.clip)
        size = float(entries.realised.norm()) or float("nan")
        facts = {
            "clip": context.workspace.clip,
            "path": context.policy.path,
            "error": float(entries.remainder.norm()) / size,
            "floor": float(entries.floor.norm()) / size,
        }
        lines = {name: getattr(entries, name) for name in Ledger._fields} | rest | {"realised": whole}
        return AnalysisResult({name: values.numpy() for name, values in lines.items()}, without_nan(facts))


LEDGER = Analysis(
    ("unclipped", "clipping", "momentum", "decay", "remainder", "unselected", "realised", "floor"),
    accumulator=LedgerAccumulator,
)
