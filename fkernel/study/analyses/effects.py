"""Analyses of the whole change: its ledger, other sizes of the step, other steps, other preconditioners."""

from __future__ import annotations

from collections.abc import Collection

import torch

from fkernel import func, precond, tree
from fkernel.analysis import Ledger, alternative_step, compare, counterfactual, ledger, step_sweep
from fkernel.analysis.parts import ENDS
from fkernel.precond.adam import Grads
from fkernel.shapes import Tensor
from fkernel.study.analyses.plan import CounterfactualPlan, SweepPlan
from fkernel.study.analyses.situation import Lacking, Situation
from fkernel.study.outcome import Finding
from fkernel.study.workspace import KernelWorkspace, selected


def ledger_of(at: Situation, floor: Tensor) -> Finding:
    """Make the ledger of every sequence; facts are of the whole request. A penalty is clipped with the batch's part.

    What parameters did that are not selected is a line of its own, and errors are of what the selected ones did.
    """
    parts = {name: at.effect(name).double().cpu() for name in ("momentum", "decay", "realised")}
    rest = {name: at.found[name].double().cpu() for name in ("unselected",) if name in at.found}
    whole = parts["realised"]
    parts["realised"] = whole - sum(rest.values())
    batch = at.found["batch"].double().cpu()
    if "penalty" in at.found:
        batch = batch + at.found["penalty"].to(batch)
    found = ledger(**parts, batch=batch, floor=floor, clip=at.workspace.clip)
    size = float(found.realised.norm()) or float("nan")
    facts = {
        "clip": at.workspace.clip,
        "path": at.policy.path,
        "error": float(found.remainder.norm()) / size,
        "floor": float(found.floor.norm()) / size,
    }
    lines = {name: getattr(found, name) for name in Ledger._fields} | rest | {"realised": whole}
    return Finding({name: values.numpy() for name, values in lines.items()}, _finite(facts))


def sweep_of(at: Situation, asked: SweepPlan) -> Finding:
    """Predict and take the step at several sizes."""
    p, m = at.policy, at.grant.microbatch
    found = step_sweep(p.f, p.params, at.E, at.step.total, asked.scales, microbatch=m)
    arrays = {name: value.cpu().numpy() for name, value in found._asdict().items()}
    arrays |= {"first_error": found.error("first").cpu().numpy(), "second_error": found.error("second").cpu().numpy()}
    arrays["noise"] = found.noise.cpu().numpy()
    facts = {"within": asked.within, "lr": sorted({*p.state.lr.values()}) if p.state else None}
    facts |= {f"{order}_holds": found.holds(asked.within, order) for order in ("first", "second")}
    return Finding(arrays, facts)


def weights_of(asked: CounterfactualPlan, workspace: KernelWorkspace) -> Tensor:
    """[n_U] w·A of a counterfactual, before clipping.

    Raises:
        RolloutError: a rule, a sequence or a prompt is not known.
        PlanError: the step's loss depends on the advantages' signs, and one changes.
    """
    batch = workspace.batch
    w = workspace.loss_weights_with(asked.advantages).clone()
    prompts = [record.provenance.global_prompt_id for record in batch]
    without = {*selected(prompts, asked.drop_prompts, "the prompts of U")}
    w[torch.tensor([prompt in without for prompt in prompts])] = 0.0
    scaled = [((pattern,), factor) for pattern, factor in asked.scale.items()]
    for patterns, factor in [(asked.drop, 0.0), (asked.flip, -1.0), *scaled]:
        for name in selected(batch.ids, patterns, "U"):
            w[workspace.index[name]] *= factor
    return workspace.signed(w)


def counterfactual_of(at: Situation, asked: CounterfactualPlan) -> Finding:
    """Predict a step that was not taken, with the D of the one that was and with its own."""
    p, m, step = at.policy, at.grant.microbatch, at.workspace.asked["step"]
    taken = at.step
    assert p.state is not None
    ascent = at.workspace.gradients.weighted_sum(weights_of(asked, at.workspace).to(at.like))
    ascent = at.workspace.with_penalty(ascent)
    max_norm = step["max_norm"] if asked.max_norm == "step" else None if asked.max_norm == "none" else asked.max_norm
    clip = step["clip"] if asked.max_norm == "step" else None
    g: Grads = {**at.gradient, **dict.fromkeys(p.unused)}
    other = alternative_step(p.params, ascent, p.state, g, max_norm=max_norm, clip=clip, lr=asked.lr)
    found = counterfactual(p.f, p.params, at.E, other, microbatch=m)
    first = func.jvp(p.f, m)(p.params, at.E, taken.total)
    size = float(found.exact.norm()) or float("nan")
    facts = {
        "changed": asked.model_dump(mode="json", exclude_defaults=True, exclude={"name"}),
        "clip": found.clip,
        "frozen_error": float((found.frozen - found.exact).norm()) / size,
        "mean_change": float((found.exact - first).mean()),
        "mean_size": float((found.exact - first).abs().mean()),
    }
    arrays = {"frozen": found.frozen, "exact": found.exact, "curvature": found.curvature, "taken": first}
    return Finding({name: value.cpu().numpy() for name, value in arrays.items()}, _finite(facts))


def preconditioners_of(at: Situation, names: Collection[str]) -> Finding:
    """Hold influences under several preconditioners against the realised change."""
    p = at.policy
    step, realised = at.step, at.effect("realised")
    if len(realised) < 2:
        raise Lacking("it needs two sequences or more")
    assert p.state is not None
    inner = [name for name in p.params if func.by_kind(name) not in ENDS]
    matrices = [name for name in inner if p.params[name].ndim == 2]
    P = precond.alternatives(p.params, at.gradient, p.state, matrices, names)
    ascent = tree.scale(-1.0, at.gradient)
    others = func.jvp(p.f, at.grant.microbatch)(p.params, at.E, tree.add(step.momentum, step.decay))
    others = others + at.found.get("unselected", 0.0)
    found = compare(p.f, p.params, at.E, ascent, P, realised, others, microbatch=at.grant.microbatch)
    table = {
        name: _finite({"realised": one.realised, "of_batch": one.of_batch, "rank": one.rank})
        for name, one in found.items()
    }
    influences = torch.stack([one.influence for one in found.values()])
    return Finding({"influence": influences.cpu().numpy()}, {"names": [*names], "agreement": table})


def _finite(facts: dict) -> dict:
    """JSON has no NaN: what is not defined is None."""
    return {name: None if isinstance(value, float) and value != value else value for name, value in facts.items()}
