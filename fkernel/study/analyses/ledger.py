"""The ledger of a request: the change as a sum that closes, with the rounding in it."""

from __future__ import annotations

import torch

from fkernel import tree
from fkernel.analysis import floor_from, floor_scale, ledger
from fkernel.distributed import ShardedTree
from fkernel.engine import KernelBlock, evaluated, own_part
from fkernel.func.handles import ProductSpec
from fkernel.func.inputs import take
from fkernel.shapes import Tensor
from fkernel.study.analyses.analysis import Accumulator, Analysis, without_nan
from fkernel.study.analyses.context import RequestContext
from fkernel.study.loss_terms import PART, parts_of
from fkernel.study.outcome import AnalysisResult

MEASURED = 6
"""Sequences whose change is evaluated in float64 too, so that the floor has the size of what rounding does here."""
ROOM = 8 << 30
"""Bytes that two float64 copies of a model may take where no memory limit says so."""


class LedgerAccumulator(Accumulator):
    """Takes the rounding in every realised change, Σ_α (θ_α ∂_α S_e)², as one more sum of squares of the walk."""

    def __init__(self, context: RequestContext, config: bool = True) -> None:
        """Begin with zeros."""
        self.context, self.floor = context, torch.zeros(len(context.batch), dtype=torch.float64)

    def ask(self, walk: ProductSpec) -> ProductSpec:
        """Ask for Σ_α θ_α² g_eα²."""
        floor = {name: leaf.square() for name, leaf in own_part(self.context.policy.params).items()}
        return walk._replace(x=walk.x._replace(squares={**walk.x.squares, "floor": floor}))

    def add(self, block: KernelBlock) -> None:
        """Take some rows."""
        self.floor[block.at] = floor_from(block.rows("floor"), self.context.before[block.at].cpu(), self.context.dtype)

    def result(self) -> AnalysisResult:
        """Make the ledger of every sequence; facts are of the whole request.

        The effect of unselected parameters is a line of its own, and errors are of what the selected ones did.
        """
        context = self.context
        terms = {name: context.effect(name).double().cpu() for name in ("momentum", "decay", "realised")}
        known = {name: v.double().cpu() for name, v in context.effects.items() if isinstance(v, Tensor) and v.ndim == 1}
        rest = {name: known[name] for name in ("unselected",) if name in known}
        whole = terms["realised"]
        terms["realised"] = whole - sum(rest.values())
        parts = {PART + part: value for part, value in parts_of(known).items()} or {"batch": known["batch"]}
        departures = {name: known[name] for name in ("arithmetic", "unexplained") if name in known}
        scale = self._scale()
        entries = ledger(batch=parts, **terms, floor=scale * self.floor, departures=departures)
        size = float(entries.realised.norm()) or float("nan")
        facts = {
            "clip": context.workspace.clip,
            "path": context.policy.path,
            "error": float(entries.remainder.norm()) / size,
            "floor": float(entries.floor.norm()) / size,
            "floor_scale": scale,
            **{name: float(value.norm()) / size for name, value in departures.items()},
        }
        lines = {**entries.terms, **rest, "realised": whole, "floor": entries.floor}
        return AnalysisResult({name: values.numpy() for name, values in lines.items()}, without_nan(facts))

    def _scale(self) -> float:
        """κ of a few sequences of E; 1 in float64, in shards, and where two copies in float64 have no room."""
        context, policy = self.context, self.context.policy
        if isinstance(policy.params, ShardedTree):
            return 1.0
        model = policy.apply.original.named_parameters()
        others = {name: leaf.detach() for name, leaf in model if name not in policy.params}
        needed = 16 * (tree.size(policy.params) + tree.size(others))
        if context.dtype == torch.float64 or needed > (context.grant.memory or ROOM):
            return 1.0
        rows = torch.linspace(0, len(context.batch) - 1, min(MEASURED, len(context.batch))).long().unique()
        E, ends = take(context.E, rows), (policy.params, context.after)

        def change(dtype: torch.dtype) -> Tensor:
            casts = (tree.cast({**others, **end}, dtype) for end in ends)
            before, after = (evaluated(policy.f, end, E, context.grant.microbatch) for end in casts)
            return (after.double() - before.double()).cpu()

        return floor_scale(change(context.dtype), change(torch.float64), self.floor[rows])


LEDGER = Analysis(
    ("batch", "part.*", "momentum", "decay", "arithmetic", "unexplained", "remainder", "unselected", "realised",
     "floor"),
    accumulator=LedgerAccumulator,
)  # fmt: skip
