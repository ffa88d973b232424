"""One batch E against a workspace: rows of K stream by, and what is asked of them is kept.

    C_eu = c w_u A_u K_eu,   batch_e = Σ_u C_eu;   momentum, decay, curvature and the realised change by passes over E
    penalty_e = c ⟨∇S_e, P · the KL term's share of the ascent⟩, where the step's loss has one

Where nothing is asked that needs K, batch = J_E (P J_Uᵀ(c w A)) is one jvp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from fkernel import func
from fkernel.engine.recycling import recycled
from fkernel.errors import RolloutError
from fkernel.precond import AdamWStep
from fkernel.rollout import SequenceRecord
from fkernel.rollout.batch import GeneratedBatch
from fkernel.shapes import Tensor
from fkernel.study.analyses.accounts import Accounts
from fkernel.study.analyses.plan import RequestAnalyses
from fkernel.study.analyses.situation import Situation
from fkernel.study.diagnostics import BlockTally, cosines, top_contributors
from fkernel.study.outcome import Entry, RequestResult, info_of
from fkernel.study.requests import CapturePlan
from fkernel.study.rows import Grant, Policy, Rows, kernel_rows, own_rows
from fkernel.study.workspace import KernelWorkspace, selected, tokens_of

EXECUTED = "the step executed here"
"""What a change was measured on that proves nothing about how the optimizer's state was read."""


class Question(NamedTuple):
    """What is asked of a batch, beside what it is.

    Attributes:
        name: the request's.
        kind: the request's.
        capture: what is computed and kept.
        advantages: other advantages than the step's, as `KernelWorkspace.weights_with` takes them.
        strict: whether an entry whose row this batch lacks is an error; what is captured of all requests is not.
        analyses: what else is asked.
    """

    name: str
    kind: str
    capture: CapturePlan
    advantages: Any = None
    strict: bool = True
    analyses: RequestAnalyses = RequestAnalyses()


def evaluate(
    question: Question,
    batch: GeneratedBatch,
    workspace: KernelWorkspace,
    policy: Policy,
    step: AdamWStep | None,
    grant: Grant,
    tick: Callable[[int], Any] = lambda n: None,
) -> RequestResult:
    """Answer one request.

    Args:
        question: what is asked.
        batch: E.
        workspace: U.
        policy: the checkpoint.
        step: Δθ; None where there is no optimizer state, or P is not calibrated: then nothing is predicted.
        grant: what may be under way at once.
        tick: called with a number of sequences of E whenever so many have met U.

    Raises:
        FKernelError: a sequence cannot be scored, a gradient is not finite (the message has its id), or an id that is
            asked for is unknown.
    """
    capture = question.capture
    weights = workspace.weights_with(question.advantages)
    E = tokens_of(batch, policy.params)
    at = Situation(batch, E, workspace, policy, step, grant, capture, weights, question.advantages)
    found = at.found
    accounts = Accounts(question.analyses, at, question.strict)
    with recycled():
        if capture.influence_only and not question.analyses.of_rows:
            towards = workspace.P(workspace.gradients.weighted_sum(weights))
            found["batch"] = func.jvp(policy.f, grant.microbatch)(policy.params, E, towards)
            tick(len(batch))
        else:
            own = None if policy.through_detach else workspace.rows_of(batch)
            rows = kernel_rows(E, workspace, policy, grant) if own is None else own_rows(workspace, own, grant)
            found |= _reduced(rows, question, batch, workspace, weights, tick, accounts)
        if at.added is not None:
            found["penalty"] = func.jvp(policy.f, grant.microbatch)(policy.params, E, at.added)
        if step is not None:
            found |= _effects(at, step)
        analyses = accounts.findings()
    facts = found.pop("facts", {}) | {"sampling": batch.diagnostics, "advantages": question.advantages}
    if "realised" in found:
        facts["realised_on"] = EXECUTED if policy.after is None else "step.after"
    arrays: dict[str, Any] = {
        name: value.cpu().numpy() if isinstance(value, Tensor) else value for name, value in found.items()
    }
    return RequestResult(
        name=question.name,
        kind=question.kind,
        evaluation=tuple(map(info_of, batch)),
        update=tuple(map(info_of, workspace.batch)),
        facts=facts,
        analyses=analyses,
        **arrays,
    )


def _effects(at: Situation, step: AdamWStep) -> dict[str, Tensor]:
    """Momentum, decay, curvature and the realised change, with what was not selected of it, [n_E] each."""
    f, params, E, m = at.policy.f, at.policy.params, at.E, at.grant.microbatch
    along = func.jvp(f, m)
    found = {"momentum": along(params, E, step.momentum), "decay": along(params, E, step.decay)}
    if at.overridden:
        return found  # the step that was taken is another one
    if at.capture.curvature:
        found["curvature"] = 0.5 * func.curvature(f, m)(params, E, step.total)
    if at.capture.realised:
        found |= at.realised(f, E)
    return found


def _reduced(
    rows: Iterator[Rows],
    question: Question,
    batch: GeneratedBatch,
    workspace: KernelWorkspace,
    weights: Tensor,
    tick: Callable[[int], Any],
    accounts: Accounts,
) -> dict[str, Any]:
    """Take rows of K as they come; keep what was asked for."""
    capture, n, m = question.capture, len(batch), len(workspace.batch)
    k = min(capture.top_k, m)
    columns = workspace.norms.weighted
    kept: dict[str, Any] = {name: torch.empty(n, dtype=torch.float64) for name in ("squared_norms", "diagonal")}
    kept |= {"top": torch.empty(n, k, dtype=torch.int64)}
    wanted, tally, entries = _wanted(question, batch, workspace), BlockTally(), list[Entry]()
    prompts = [record.provenance.global_prompt_id for record in workspace.batch]
    names = [*map(_identity, workspace.batch)]
    for block in rows:
        at, K, norms, _ = block
        C = K * weights.to(K)
        cosine = cosines(K, norms.weighted, columns)
        if "batch" not in kept:
            kept |= {"batch": K.new_empty(n), "top_contributions": K.new_empty(n, k)}
            kept |= {name: K.new_empty(n, m) for name in ("kernel", "contributions") if capture.kernel}
        kept["batch"][at], kept["squared_norms"][at], kept["diagonal"][at] = C.sum(1), norms.plain, norms.weighted
        kept["top"][at], kept["top_contributions"][at] = top_contributors(C, k)
        if capture.kernel:
            kept["kernel"][at], kept["contributions"][at] = K, C
        own = [batch.records[e] for e in at.tolist()]
        same = torch.tensor([[a == b for b in prompts] for a in (one.provenance.global_prompt_id for one in own)])
        others = torch.tensor([[a != b for b in names] for a in map(_identity, own)])
        tally.add(K[others], cosine[others], same[others])
        for r, e in enumerate(at.tolist()):
            for u in wanted.get(e, ()):
                ids = batch.ids[e], workspace.batch.ids[u]
                entries.append(Entry(*ids, float(K[r, u]), float(cosine[r, u]), float(C[r, u])))
        accounts.add(block)
        tick(len(at))
    place = {name: i for i, name in enumerate(batch.ids)}
    entries.sort(key=lambda entry: (place[entry.row], workspace.index[entry.column]))
    facts = {"blocks": tally.blocks._asdict()}
    return {**kept, "update_diagonal": columns, "selected": tuple(entries), "facts": facts}


def _identity(record: SequenceRecord) -> tuple[str, str]:
    """What only the same sequence has: its id, with the hash of its tokens."""
    return record.sequence_id, record.content_hash


def _wanted(question: Question, batch: GeneratedBatch, workspace: KernelWorkspace) -> dict[int, list[int]]:
    """Which entries are kept by id: {row: columns}."""
    capture = question.capture
    place = {name: i for i, name in enumerate(batch.ids)}
    pairs = set[tuple[int, int]]()
    for row, column in capture.pairs:
        if row not in place and not question.strict:
            continue
        if row not in place:
            raise RolloutError(f"The pair [{row}, {column}] names a row that is no sequence of this request.")
        pairs.add((place[row], workspace.row(column)))
    for block in capture.submatrices:
        rows = selected(batch.ids, block.rows, "this request", question.strict)
        columns = selected(workspace.batch.ids, block.columns, "the update batch")
        pairs |= {(place[e], workspace.index[u]) for e in rows for u in columns}
    found: dict[int, list[int]] = {}
    for e, u in sorted(pairs):
        found.setdefault(e, []).append(u)
    return found
