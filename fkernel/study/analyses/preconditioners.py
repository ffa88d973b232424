"""Influences under other preconditioners, compared with the realised change."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch

from fkernel import func, precond, tree
from fkernel.analysis import ENDS, compare
from fkernel.precond import AdamWState
from fkernel.study.analyses.analysis import Analysis, without_nan
from fkernel.study.analyses.context import RequestContext
from fkernel.study.analyses.failures import AnalysisUnavailable
from fkernel.study.outcome import AnalysisResult

PreconditionerName = Literal["identity", "frozen", "post-step", "adamw", "rmsprop", "adafactor", "lion", "muon"]
"""Names that `fkernel.precond.alternatives` accepts."""


def compute(context: RequestContext, config: Collection[str]) -> AnalysisResult:
    """Compare influences under several preconditioners with the realised change."""
    p = context.policy
    step, realised = context.step, context.effect("realised")
    if len(realised) < 2:
        raise AnalysisUnavailable("it needs two sequences or more")
    if not isinstance(p.state, AdamWState):
        raise AnalysisUnavailable("it makes other optimizers' preconditioners of AdamW's moments, and there are none")
    inner = [name for name in p.params if func.by_kind(name) not in ENDS]
    matrices = [name for name in inner if p.params[name].ndim == 2]
    P = precond.alternatives(p.params, context.gradient, p.state, matrices, config)
    ascent = tree.scale(-1.0, context.gradient)
    others = func.jvp(p.f, context.grant.microbatch)(p.params, context.E, tree.add(step.momentum, step.decay))
    others = others + context.effects.get("unselected", 0.0)
    agreements = compare(p.f, p.params, context.E, ascent, P, realised, others, microbatch=context.grant.microbatch)
    table = {
        name: without_nan({"realised": a.realised, "of_batch": a.of_batch, "rank": a.rank})
        for name, a in agreements.items()
    }
    influences = torch.stack([agreement.influence for agreement in agreements.values()])
    return AnalysisResult({"influence": influences.cpu().numpy()}, {"names": [*config], "agreement": table})


PRECONDITIONERS = Analysis(("influence",), compute=compute)
