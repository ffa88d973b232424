"""What P rests on: coordinates that the optimizer hardly knows, and how much of the kernel's trace they carry."""

from __future__ import annotations

from fkernel.analysis import health
from fkernel.study.analyses.analysis import Analysis
from fkernel.study.analyses.context import UpdateContext
from fkernel.study.analyses.failures import AnalysisUnavailable
from fkernel.study.outcome import AnalysisResult


def compute(context: UpdateContext, config: bool = True) -> AnalysisResult:
    """Tell what P rests on."""
    workspace, policy = context.workspace, context.policy
    if policy.state is None or workspace.P.d is None:
        raise AnalysisUnavailable("it needs an optimizer's second moment, and a preconditioner made of it")
    result = health(policy.state, workspace.P.d, workspace.gradients.squared_sum())
    shares = {name: None if share is None else share._asdict() for name, share in result._asdict().items()
              if name in ("unseen", "below_eps", "smallest")}  # fmt: skip
    facts = {"coordinates": result.coordinates, "dominated": result.dominated, "by_parameter": result.by_parameter}
    return AnalysisResult({}, facts | shares)


HEALTH = Analysis((), compute=compute)
