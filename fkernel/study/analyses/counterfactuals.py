"""Counterfactual steps: E's change under other advantages, another clipping, another learning rate."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator

from fkernel import func, tree
from fkernel.analysis import alternative_step, counterfactual
from fkernel.errors import PlanError, listing
from fkernel.precond import Grads
from fkernel.shapes import Tensor, Tree
from fkernel.study.analyses.analysis import Analysis, without_nan
from fkernel.study.analyses.context import RequestContext
from fkernel.study.analyses.observables import ObservablePlan, observable_of
from fkernel.study.config.values import Name, Strict
from fkernel.study.loss_terms import OWN, Columns, columns_of
from fkernel.study.losses import clipped_ratio_of
from fkernel.study.outcome import AnalysisResult
from fkernel.study.workspace import KernelWorkspace, selected, tokens_of


class CounterfactualPlan(Strict):
    """A counterfactual step on U's gradients.

    Attributes:
        name: its name in results.
        advantages: a rule's name, or {id: advantage} for some of U.
        drop: ids of sequences of U to leave out; `*` matches any characters.
        drop_prompts: global_prompt_ids of prompts of U to leave out.
        flip: sequences of U whose advantage changes its sign.
        scale: {sequences of U: factor}.
        parts: {part of the loss: factor}, such as {kl: 2, entropy: 0}; of the whole batch.
        clip_range: (low, high) of a clipped ratio, in place of the loss's own; U is scored again.
        observables: what else the step would have changed, as of the analysis of that name.
        max_norm: another clipping threshold; "none" for none, "step" for the step's own.
        lr: learning rate, relative to the step's own.
    """

    name: Name
    advantages: str | dict[str, float] | None = None
    drop: tuple[str, ...] = ()
    drop_prompts: tuple[str, ...] = ()
    flip: tuple[str, ...] = ()
    scale: dict[str, float] = Field(default_factory=dict)
    parts: dict[str, float] = Field(default_factory=dict)
    clip_range: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0)]] | None = None
    observables: tuple[ObservablePlan, ...] = ()
    max_norm: Annotated[float, Field(gt=0)] | Literal["step", "none"] = "step"
    lr: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def _something(self) -> CounterfactualPlan:
        if self == CounterfactualPlan.model_construct(name=self.name, observables=self.observables):
            raise ValueError(f"the counterfactual {self.name!r} changes nothing; say what would have been different")
        return self

    @property
    def by_sequence(self) -> bool:
        """Whether sequences are weighed otherwise than they were."""
        return bool(self.advantages or self.drop or self.drop_prompts or self.flip or self.scale)


def weights_of(config: CounterfactualPlan, workspace: KernelWorkspace) -> Tensor:
    """[n_U] w·A of a counterfactual, before clipping.

    Raises:
        RolloutError: an unknown rule, sequence or prompt.
        PlanError: the step's loss depends on the advantages' signs, and one changes.
    """
    batch = workspace.batch
    w = workspace.loss_weights_with(config.advantages).clone()
    prompts = [record.provenance.global_prompt_id for record in batch]
    dropped = {*selected(prompts, config.drop_prompts, "the prompts of U")}
    w[torch.tensor([prompt in dropped for prompt in prompts])] = 0.0
    scaled = [((pattern,), factor) for pattern, factor in config.scale.items()]
    for patterns, factor in [(config.drop, 0.0), (config.flip, -1.0), *scaled]:
        for name in selected(batch.ids, patterns, "U"):
            w[workspace.index[name]] *= factor
    return workspace.signed(w)


def check_parts(config: CounterfactualPlan, workspace: KernelWorkspace) -> None:
    """Check that the loss has the parts and the ratio that a counterfactual changes.

    Raises:
        PlanError: it has not, or whole parts and single sequences are changed at once.
    """
    loss = workspace.loss
    names = [] if loss is None else [*loss.parts] if loss.within else [OWN, *loss.parts]
    if unknown := [part for part in config.parts if part not in names]:
        raise PlanError(
            f"The counterfactual {config.name!r} weighs the part {unknown[0]!r} of the loss, which has "
            f"{listing(names) or 'a single part'}."
        )
    if loss is not None and {*config.parts} & {*loss.within} and config.by_sequence:
        raise PlanError(
            f"The counterfactual {config.name!r} weighs parts of the loss and sequences of U at once; these parts are "
            f"kept as sums over U: ask for the two one by one."
        )
    if config.clip_range is not None and (loss is None or loss.log_ratio is None):
        raise PlanError(
            f"The counterfactual {config.name!r} changes the clipping range, and step.loss has no clipped ratio."
        )


def ascent_of(context: RequestContext, config: CounterfactualPlan) -> Tree:
    """−∇L of a counterfactual, before clipping."""
    workspace, w = context.workspace, weights_of(config, context.workspace).to(context.like)
    if config.clip_range is None:
        ascent = workspace.gradients.weighted_sum(w)
    else:
        f, U = _clipped_otherwise(context, config.clip_range)
        ascent = func.vjp(f, context.grant.microbatch)(context.policy.params, U, w)
    loss = workspace.loss
    if loss is None:
        return ascent
    if not loss.within:
        ascent = tree.scale(config.parts.get(OWN, 1.0), ascent)
    for part, v in loss.parts.items():  # those within the columns are in their sum already
        factor = config.parts.get(part, 1.0) - (part in loss.within)
        ascent = tree.axpy(factor, v, ascent) if factor else ascent
    return ascent


def _clipped_otherwise(context: RequestContext, clip_range: tuple[float, float]) -> Columns:
    """U's columns under another clipping range."""
    workspace, p = context.workspace, context.policy
    assert workspace.loss is not None
    U = tokens_of(workspace.batch, p.params)
    ratio = clipped_ratio_of(workspace.loss, workspace.batch.advantages, U.response_mask, *clip_range)
    return columns_of(p.f, p.trained, p.temperature, U, workspace.loss._replace(ratio=ratio))


def compute(context: RequestContext, config: CounterfactualPlan) -> AnalysisResult:
    """Predict a counterfactual step, with the D of the real step and with its own."""
    p, m, step = context.policy, context.grant.microbatch, context.workspace.spec["step"]
    taken = context.step
    assert p.state is not None
    ascent = ascent_of(context, config)
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
    for observable in config.observables:
        f, E, rows = observable_of(context, observable)
        exact = func.jvp(f, m)(p.params, E, other.exact.total)
        real = func.jvp(f, m)(p.params, E, taken.total)
        arrays |= {f"{observable.name}.exact": exact, f"{observable.name}.taken": real}
        facts.setdefault("observables", {})[observable.name] = {
            "rows": rows,
            "mean": float(exact.mean()),
            "taken": float(real.mean()),
        }
    return AnalysisResult({name: value.cpu().numpy() for name, value in arrays.items()}, without_nan(facts))


def _check(context: RequestContext, config: CounterfactualPlan) -> None:
    check_parts(config, context.workspace)
    weights_of(config, context.workspace)


COUNTERFACTUALS = Analysis(
    ("frozen", "exact", "curvature", "taken", "*.exact", "*.taken"),
    compute=compute,
    check=_check,
    several=True,
)
