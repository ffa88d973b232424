"""Steps that were not taken: what E would have gained under other advantages, another clipping, another rate."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator

from fkernel import func
from fkernel.analysis import alternative_step, counterfactual
from fkernel.precond import Grads
from fkernel.shapes import Tensor
from fkernel.study.analyses.analysis import NAME, Analysis, without_nan
from fkernel.study.analyses.context import RequestContext
from fkernel.study.config.base import Strict
from fkernel.study.outcome import AnalysisResult
from fkernel.study.workspace import KernelWorkspace, selected


class CounterfactualPlan(Strict):
    """A step that was not taken, on gradients that are held.

    Attributes:
        name: what results call it.
        advantages: a rule's name, or {id: advantage} for some of U.
        drop: sequences of U without which, by id; `*` stands for any characters.
        drop_prompts: prompts of U without which, by global_prompt_id.
        flip: sequences of U whose advantage changes its sign.
        scale: {sequences of U: factor}.
        max_norm: another clipping threshold; "none" for none, "step" for the step's own.
        lr: learning rate over the step's own.
    """

    name: str = Field(pattern=NAME)
    advantages: str | dict[str, float] | None = None
    drop: tuple[str, ...] = ()
    drop_prompts: tuple[str, ...] = ()
    flip: tuple[str, ...] = ()
    scale: dict[str, float] = Field(default_factory=dict)
    max_norm: Annotated[float, Field(gt=0)] | Literal["step", "none"] = "step"
    lr: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def _something(self) -> CounterfactualPlan:
        if self == CounterfactualPlan.model_construct(name=self.name):
            raise ValueError(f"the counterfactual {self.name!r} changes nothing; say what would have been different")
        return self


def weights_of(config: CounterfactualPlan, workspace: KernelWorkspace) -> Tensor:
    """[n_U] w·A of a counterfactual, before clipping.

    Raises:
        RolloutError: a rule, a sequence or a prompt is not known.
        PlanError: the step's loss depends on the advantages' signs, and one changes.
    """
    batch = workspace.batch
    w = workspace.loss_weights_with(config.advantages).clone()
    prompts = [record.provenance.global_prompt_id for record in batch]
    without = {*selected(prompts, config.drop_prompts, "the prompts of U")}
    w[torch.tensor([prompt in without for prompt in prompts])] = 0.0
    scaled = [((pattern,), factor) for pattern, factor in config.scale.items()]
    for patterns, factor in [(config.drop, 0.0), (config.flip, -1.0), *scaled]:
        for name in selected(batch.ids, patterns, "U"):
            w[workspace.index[name]] *= factor
    return workspace.signed(w)


def compute(context: RequestContext, config: CounterfactualPlan) -> AnalysisResult:
    """Predict a step that was not taken, with the D of the one that was and with its own."""
    p, m, step = context.policy, context.grant.microbatch, context.workspace.spec["step"]
    taken = context.step
    assert p.state is not None
    ascent = context.workspace.gradients.weighted_sum(weights_of(config, context.workspace).to(context.like))
    ascent = context.workspace.with_penalty(ascent)
    max_norm = step["max_norm"] if config.max_norm == "step" else None if config.max_norm == "none" else config.max_norm
    clip = step["clip"] if config.max_norm == "step" else None
    g: Grads = {**context.gradient, **dict.fromkeys(p.unused)}
    other = alternative_step(p.params, ascent, p.state, g, max_norm=max_norm, clip=clip, lr=config.lr)
    change = counterfactual(p.f, p.params, context.E, other, microbatch=m)
    first = func.jvp(p.f, m)(p.params, context.E, taken.total)
    size = float(change.exact.norm()) or float("nan")
    facts = {
        "changed": config.model_dump(mode="json", exclude_defaults=True, exclude={"name"}),
        "clip": change.clip,
        "frozen_error": float((change.frozen - change.exact).norm()) / size,
        "mean_change": float((change.exact - first).mean()),
        "mean_size": float((change.exact - first).abs().mean()),
    }
    arrays = {"frozen": change.frozen, "exact": change.exact, "curvature": change.curvature, "taken": first}
    return AnalysisResult({name: value.cpu().numpy() for name, value in arrays.items()}, without_nan(facts))


COUNTERFACTUALS = Analysis(
    ("frozen", "exact", "curvature", "taken"),
    compute=compute,
    check=lambda context, config: weights_of(config, context.workspace),
    several=True,
)
