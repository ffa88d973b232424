"""The step at several sizes, predicted and measured: where predictions stop holding."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fkernel.analysis import DECADES, step_sweep
from fkernel.study.analyses.analysis import Analysis
from fkernel.study.analyses.context import RequestContext
from fkernel.study.config.values import Strict
from fkernel.study.facts import settings_of
from fkernel.study.outcome import AnalysisResult


class SweepPlan(Strict):
    """The step at several sizes."""

    scales: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        DECADES, min_length=1, description="multiples of the step"
    )
    within: float = Field(0.01, gt=0, description="relative error up to which a prediction holds")


def compute(context: RequestContext, config: SweepPlan) -> AnalysisResult:
    """Predict and measure the step at several sizes."""
    p, m = context.policy, context.grant.microbatch
    sweep = step_sweep(p.f, p.params, context.E, context.step.total, config.scales, microbatch=m)
    arrays = {name: value.cpu().numpy() for name, value in sweep._asdict().items()}
    arrays |= {"first_error": sweep.error("first").cpu().numpy(), "second_error": sweep.error("second").cpu().numpy()}
    arrays["noise"] = sweep.noise.cpu().numpy()
    facts = {"within": config.within, "lr": settings_of(p.state, "lr") if p.state else None}
    facts |= {f"{order}_holds": sweep.holds(config.within, order) for order in ("first", "second")}
    return AnalysisResult(arrays, facts)


SWEEP = Analysis(
    ("scales", "first", "second", "realised", "floor", "first_error", "second_error", "noise"), compute=compute
)
