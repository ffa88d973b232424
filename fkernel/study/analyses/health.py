"""Coordinates with a tiny second moment, and their share of the kernel's trace."""

from __future__ import annotations

from fkernel.analysis import health
from fkernel.precond import AdamWState
from fkernel.study.analyses.analysis import Analysis
from fkernel.study.analyses.context import UpdateContext
from fkernel.study.analyses.failures import AnalysisUnavailable
from fkernel.study.outcome import AnalysisResult


def compute(context: UpdateContext, config: bool = True) -> AnalysisResult:
    """Shares of coordinates with a small or zero second moment."""
    workspace, policy = context.workspace, context.policy
    if not isinstance(policy.state, AdamWState) or workspace.P.d is None:
        raise AnalysisUnavailable("it needs AdamW's second moment, and a preconditioner made of it")
    result = health(policy.state, workspace.P.d, workspace.gradients.squared_sum())
    shares = {name: None if share is None else share._asdict() for name, share in result._asdict().items()
              if name in ("unseen", "below_eps", "smallest")}  # fmt: skip
    facts = {"coordinates": result.coordinates, "dominated": result.dominated, "by_parameter": result.by_parameter}
    return AnalysisResult({}, facts | shares)


HEALTH = Analysis((), compute=compute)
