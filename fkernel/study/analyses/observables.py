"""Other quantities than log π of a request: contributions of U, momentum, decay, and the realised change."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator

from fkernel import func
from fkernel.engine import check_side
from fkernel.errors import RolloutError, listing
from fkernel.func.handles import ProductSpec, RowSpec
from fkernel.func.inputs import take
from fkernel.rollout import GeneratedBatch, dotted
from fkernel.shapes import Tensor
from fkernel.study.analyses.analysis import Analysis
from fkernel.study.analyses.context import RequestContext
from fkernel.study.analyses.failures import AnalysisUnavailable
from fkernel.study.config.base import CheckpointPlan
from fkernel.study.config.values import Name, Strict
from fkernel.study.diagnostics import top_contributors
from fkernel.study.loss_terms import with_parts
from fkernel.study.outcome import AnalysisResult
from fkernel.study.rows import walked

OBSERVABLE = "a function that makes an observable: (apply, temperature) -> f"


class ObservablePlan(Strict):
    """Another quantity than log π that the step changes.

    Attributes:
        name: its name in results.
        kind: "entropy", the mean over the response; "kl" to a reference, summed over it; "log_odds" of two sequences of
            the request; "expected_reward" over the sequences of a prompt, as a finite set of answers; or "function".
        reference: the reference's checkpoint, of kind kl.
        pairs: ids of the request's sequences, of kind log_odds.
        function: dotted name, of kind function: (apply, temperature) -> f, and f: (params, Sequences[n t]) -> [n].
    """

    name: Name
    kind: Literal["entropy", "kl", "log_odds", "expected_reward", "function"]
    reference: CheckpointPlan | None = None
    pairs: tuple[tuple[str, str], ...] | None = Field(None, min_length=1)
    function: str | None = None

    @model_validator(mode="after")
    def _needs(self) -> ObservablePlan:
        needed = {"kl": "reference", "log_odds": "pairs", "function": "function"}
        for kind, field in needed.items():
            if (getattr(self, field) is None) == (self.kind == kind):
                raise ValueError(f"an observable of kind {kind!r} needs {field}, and no other kind takes it")
        return self


class Observable(NamedTuple):
    """A function, its inputs, and the names of its rows."""

    f: Any
    batch: Any
    rows: list[str]


def compute(context: RequestContext, config: ObservablePlan) -> AnalysisResult:
    """Explain an observable as log π is explained.

    Raises:
        RolloutError: a pair names an unknown sequence, where strict.
        FKernelError: the observable cannot be created, or is not one.
    """
    f, E, rows = observable_of(context, config)
    p, m, n = context.policy._replace(f=f), context.grant.microbatch, len(rows)
    check_side("E", f, p.params, E)
    k, like = min(context.capture.top_k, len(context.weights)), partial(torch.zeros, dtype=torch.float64)
    vectors = context.vectors
    arrays: dict[str, Tensor] = {"batch": like(n), "top": torch.zeros(n, k, dtype=torch.int64)}
    arrays |= {"top_contributions": like(n, k), **{name: like(n) for name in vectors}}
    if context.capture.kernel:
        arrays["contributions"] = like(n, len(context.weights))
    for block in walked(
        E, context.workspace, p, context.grant, ProductSpec({"": context.workspace.P.d}, RowSpec(vectors))
    ):
        C = block.kernel() * context.weights.double()
        arrays["batch"][block.at] = C.sum(1)
        arrays["top"][block.at], arrays["top_contributions"][block.at] = top_contributors(C, k)
        for name in vectors:
            arrays[name][block.at] = block.rows(name)
        if context.capture.kernel:
            arrays["contributions"][block.at] = C
    arrays |= with_parts(arrays, context.workspace.loss)
    arrays["value"] = func.evaluate(f, m)(p.params, E)
    arrays |= context.measured(f, E, arrays["value"])
    return AnalysisResult(
        {name: value.cpu().numpy() for name, value in arrays.items()}, {"kind": config.kind, "rows": rows}
    )


def observable_of(context: RequestContext, config: ObservablePlan) -> Observable:
    """Make the function, its inputs and the names of its rows."""
    apply, temperature, ids = context.policy.apply, context.policy.temperature, context.batch.ids
    match config.kind:
        case "entropy":
            return Observable(func.mean_entropy(apply, temperature), context.E, ids)
        case "kl":
            assert config.reference is not None
            reference, params = config.reference.load_policy(context.policy.params, "observables")
            reference = replace(reference, padding_idx=None)
            return Observable(func.kl_divergence(apply, params, temperature, reference), context.E, ids)
        case "function":
            make = dotted(str(config.function), OBSERVABLE)
            return Observable(make(apply, temperature), context.E, ids)
        case "log_odds":
            return _odds(context, config)
        case _:
            return expected_rewards(apply, temperature, context.batch, context.E, context.like)


def _odds(context: RequestContext, config: ObservablePlan) -> Observable:
    row_of = {name: i for i, name in enumerate(context.batch.ids)}
    pairs = [pair for pair in config.pairs or () if {*pair} <= {*row_of}]
    if context.strict and (unknown := [name for pair in config.pairs or () for name in pair if name not in row_of]):
        raise RolloutError(f"observables.{config.name}: {unknown[0]!r} is none of this request's {listing([*row_of])}.")
    if not pairs:
        raise AnalysisUnavailable(f"none of the pairs of {config.name!r} is of this request")
    first, second = (take(context.E, torch.tensor([row_of[pair[i]] for pair in pairs])) for i in (0, 1))
    return Observable(func.log_odds(context.policy.apply, context.policy.temperature), func.Pair(first, second), [
        f"{a} | {b}" for a, b in pairs
    ])  # fmt: skip


def expected_rewards(apply: Any, temperature: float, batch: GeneratedBatch, E: Any, like: Tensor) -> Observable:
    """Expected reward over the distinct completions of a prompt; every prompt must have as many completions.

    Completions with equal texts are one answer, the first of them, since rewards are of texts.

    Args:
        apply: the policy.
        temperature: τ.
        batch: the sequences, with rewards.
        E: the same as the engine takes them.
        like: for the rewards' device and dtype.

    Raises:
        AnalysisUnavailable: a prompt has one answer, prompts have different numbers of them, or rewards are missing.
    """
    prompts: dict[str, list[int]] = {}
    for i, record in enumerate(batch):
        prompts.setdefault(record.provenance.global_prompt_id, []).append(i)
    sizes = {len(rows) for rows in prompts.values()}
    if sizes == {1} or len(sizes) > 1:
        raise AnalysisUnavailable(
            f"it needs two answers or more a prompt, of each prompt as many; there are {sorted(sizes)}"
        )
    try:
        rewards = batch.rewards
    except RolloutError as error:
        raise AnalysisUnavailable(str(error)) from None
    different = [[*{batch.records[i].response: i for i in reversed(rows)}.values()] for rows in prompts.values()]
    most = max(map(len, different))
    table = torch.tensor(
        [rows + rows[:1] * (most - len(rows)) for rows in different]
    )  # padded with repetitions, which count once
    answers = tuple(take(E, table[:, k]) for k in range(table.shape[1]))
    return Observable(
        func.expected_reward(apply, temperature), func.Answers(answers, rewards[table].to(like)), [*prompts]
    )


OBSERVABLES = Analysis(
    ("value", "batch", "part.*", "momentum", "decay", "arithmetic", "unexplained", "curvature", "realised",
     "unselected", "top", "top_contributions", "contributions"),
    compute=compute, several=True, own_rows=True,
)  # fmt: skip
