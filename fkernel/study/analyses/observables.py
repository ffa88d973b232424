"""Other quantities than log π of a request, each with contributions of U, momentum, decay and its change."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from fkernel import func
from fkernel.engine.sides import check_side
from fkernel.errors import PlanError, RolloutError, listing
from fkernel.func.batch import take
from fkernel.func.contract import Asked, Own
from fkernel.rollout.rewards import dotted
from fkernel.shapes import Tensor, Tree
from fkernel.study.analyses.plan import OBSERVABLE, ObservablePlan
from fkernel.study.analyses.situation import Lacking, Situation
from fkernel.study.diagnostics import top_contributors
from fkernel.study.outcome import Finding
from fkernel.study.rows import walked


class Observable(NamedTuple):
    """A function, what it takes, and what its rows are called."""

    f: Any
    batch: Any
    rows: list[str]


def observable_of(at: Situation, asked: ObservablePlan, strict: bool) -> Finding:
    """Explain an observable as log π is explained.

    Raises:
        RolloutError: a pair names a sequence that is not there, where strict.
        FKernelError: the observable cannot be made, or is none.
    """
    f, E, rows = _made(at, asked, strict)
    p, m, n = at.policy._replace(f=f), at.grant.microbatch, len(rows)
    check_side("E", f, p.params, E)
    k, like = min(at.capture.top_k, len(at.weights)), partial(torch.zeros, dtype=torch.float64)
    vectors = {name: v for name, v in at.vectors.items() if name == "penalty" or not at.overridden}
    found: dict[str, Tensor] = {"batch": like(n), "top": torch.zeros(n, k, dtype=torch.int64)}
    found |= {"top_contributions": like(n, k), **{name: like(n) for name in vectors}}
    if at.capture.kernel:
        found["contributions"] = like(n, len(at.weights))
    for block in walked(E, at.workspace, p, at.grant, Asked({"": at.workspace.P.d}, Own(vectors))):
        C = block.kernel() * at.weights.double()
        found["batch"][block.at] = C.sum(1)
        found["top"][block.at], found["top_contributions"][block.at] = top_contributors(C, k)
        for name in vectors:
            found[name][block.at] = block.rows(name)
        if at.capture.kernel:
            found["contributions"][block.at] = C
    found["value"] = func.evaluate(f, m)(p.params, E)
    if at.taken is not None and not at.overridden:
        if at.capture.curvature:
            found["curvature"] = 0.5 * func.curvature(f, m)(p.params, E, at.taken.total)
        if at.capture.realised:
            found |= at.realised(f, E, found["value"])
    return Finding({name: value.cpu().numpy() for name, value in found.items()}, {"kind": asked.kind, "rows": rows})


def _made(at: Situation, asked: ObservablePlan, strict: bool) -> Observable:
    apply, temperature, ids = at.policy.apply, at.policy.temperature, at.batch.ids
    match asked.kind:
        case "entropy":
            return Observable(func.mean_entropy(apply, temperature), at.E, ids)
        case "kl":
            reference, params = _reference(at, asked)
            return Observable(func.kl_divergence(apply, params, temperature, reference), at.E, ids)
        case "function":
            make = dotted(str(asked.function), OBSERVABLE)
            return Observable(make(apply, temperature), at.E, ids)
        case "log_odds":
            return _odds(at, asked, strict)
        case _:
            return _rewards(at)


def _reference(at: Situation, asked: ObservablePlan) -> tuple[func.Apply, Tree]:
    """The whole reference, whichever of its parameters the plan selects in the policy."""
    assert asked.reference is not None
    leaf = next(iter(at.policy.params.values()))
    model = asked.reference.load_weights(leaf.dtype).model.to(leaf.device)
    reference, named = func.make_functional(model, select=lambda name: True)
    if missing := sorted({*at.policy.params} - {*named}):
        raise PlanError(f"observables: {asked.reference.path} has no {missing[0]!r}; is it the same model's?")
    return replace(reference, padding_idx=None), named


def _odds(at: Situation, asked: ObservablePlan, strict: bool) -> Observable:
    place = {name: i for i, name in enumerate(at.batch.ids)}
    pairs = [pair for pair in asked.pairs or () if {*pair} <= {*place}]
    if strict and (unknown := [name for pair in asked.pairs or () for name in pair if name not in place]):
        raise RolloutError(f"observables.{asked.name}: {unknown[0]!r} is none of this request's {listing([*place])}.")
    if not pairs:
        raise Lacking(f"none of the pairs of {asked.name!r} is of this request")
    first, second = (take(at.E, torch.tensor([place[pair[i]] for pair in pairs])) for i in (0, 1))
    return Observable(func.log_odds(at.policy.apply, at.policy.temperature), func.Pair(first, second), [
        f"{a} | {b}" for a, b in pairs
    ])  # fmt: skip


def _rewards(at: Situation) -> Observable:
    """The different completions of a prompt are its answers; every prompt has as many completions.

    Completions of one text are one answer, as it was first written: it is the text that is read and rewarded.
    """
    prompts: dict[str, list[int]] = {}
    for i, record in enumerate(at.batch):
        prompts.setdefault(record.provenance.global_prompt_id, []).append(i)
    sizes = {len(rows) for rows in prompts.values()}
    if sizes == {1} or len(sizes) > 1:
        raise Lacking(f"it needs two answers or more a prompt, of each prompt as many; there are {sorted(sizes)}")
    try:
        rewards = at.batch.rewards
    except RolloutError as error:
        raise Lacking(str(error)) from None
    different = [[*{at.batch.records[i].response: i for i in reversed(rows)}.values()] for rows in prompts.values()]
    most = max(map(len, different))
    table = torch.tensor([rows + rows[:1] * (most - len(rows)) for rows in different])  # a repetition counts once
    answers = tuple(take(at.E, table[:, k]) for k in range(table.shape[1]))
    f = func.expected_reward(at.policy.apply, at.policy.temperature)
    return Observable(f, func.Answers(answers, rewards[table].to(at.like)), [*prompts])
