"""One batch E against a workspace: rows of K stream by, and what is asked of them is kept.

    C_eu = c w_u A_u ⟨ḡ_e, P ∇S_u⟩,   batch_e = Σ_u C_eu,   ḡ_e at the nodes of the step's path (`fkernel.engine.path`)
    momentum_e = ⟨ḡ_e, Δθ_momentum⟩,  decay_e = ⟨ḡ_e, Δθ_decay⟩
    penalty_e = ⟨ḡ_e, P c · the KL term's share of the ascent⟩, where the step's loss has one

All of it is taken of one walk over E's and U's gradients. Where nothing is asked that needs K, U's are not read:
batch_e = ⟨ḡ_e, P J_Uᵀ(c w A)⟩ is one more such column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from fkernel import func
from fkernel.engine import KernelBlock, reuse_memory
from fkernel.errors import RolloutError
from fkernel.func.handles import ProductSpec, RowSpec
from fkernel.precond import AdamWStep
from fkernel.rollout import GeneratedBatch, SequenceRecord
from fkernel.shapes import Tensor, Tree
from fkernel.study.analyses.context import RequestContext
from fkernel.study.analyses.registry import RequestAnalyses
from fkernel.study.analyses.runner import AnalysisRunner
from fkernel.study.config.capture import CapturePlan
from fkernel.study.diagnostics import BlockTally, cosines, top_contributors
from fkernel.study.outcome import Entry, RequestResult, info_of
from fkernel.study.rows import MemoryBudget, Policy, walked
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
    grant: MemoryBudget,
    on_progress: Callable[[int], Any] = lambda n: None,
) -> RequestResult:
    """Answer one request.

    Args:
        question: what is asked.
        batch: E.
        workspace: U.
        policy: the checkpoint.
        step: Δθ; None where there is no optimizer state, or P is not calibrated: then nothing is predicted.
        grant: what may be under way at once.
        on_progress: called with a number of sequences of E whenever so many have met U.

    Raises:
        FKernelError: a sequence cannot be scored, a gradient is not finite (the message has its id), or an id that is
            asked for is unknown.
    """
    capture = question.capture
    weights = workspace.weights_with(question.advantages)
    E = tokens_of(batch, policy.params)
    at = RequestContext(
        batch, E, workspace, policy, step, grant, capture, weights, question.advantages, question.strict
    )
    found, analyses = at.effects, AnalysisRunner(question.analyses, at)
    needs_K = not capture.influence_only or question.analyses.of_rows
    with reuse_memory():
        spec = analyses.ask(_asked(at, needs_K))
    with (
        reuse_memory()
    ):  # once more: what making those vectors freed goes back to the system, and is not beside the walk
        own = None if policy.through_detach or policy.path != "start" else workspace.rows_of(batch)
        blocks = walked(E, workspace, policy, grant, spec, own)
        if needs_K:
            found |= _reduced(blocks, question, batch, workspace, weights, on_progress, analyses, at.dtype)
        else:
            found |= _alone(blocks, at, ("batch", *at.vectors))
            on_progress(len(batch))
        found |= at.measured(policy.f, E)
        answers = analyses.results()
    facts = found.pop("facts", {}) | {"sampling": batch.diagnostics, "advantages": question.advantages}
    facts["path"] = policy.path
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
        analyses=answers,
        **arrays,
    )


def _asked(at: RequestContext, needs_K: bool) -> ProductSpec:
    """What every request asks of the walk; analyses add to it."""
    P, vectors = at.workspace.P.d, dict(at.vectors)
    if not needs_K:
        vectors["batch"] = at.workspace.P(at.workspace.gradients.weighted_sum(at.weights.to(at.like)))
        return ProductSpec(x=RowSpec(vectors))
    norms: dict[str, Tree | None] = {"squared_norms": None, "diagonal": P}
    return ProductSpec(
        {"": P}, RowSpec(vectors, norms), RowSpec() if at.workspace.has_norms else RowSpec(squares=norms)
    )


def _alone(blocks: Iterator[KernelBlock], at: RequestContext, names: Iterable[str]) -> dict[str, Tensor]:
    """Take what was asked of E's rows by themselves, [n_E] each."""
    found = {name: torch.empty(len(at.batch), dtype=at.dtype) for name in names}
    for block in blocks:
        for name, values in found.items():
            values[block.at] = block.rows(name).to(at.dtype)
    return found


def _reduced(
    blocks: Iterator[KernelBlock],
    question: Question,
    batch: GeneratedBatch,
    workspace: KernelWorkspace,
    weights: Tensor,
    on_progress: Callable[[int], Any],
    analyses: AnalysisRunner,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Take rows of K as they come; keep what was asked for."""
    capture, n, m = question.capture, len(batch), len(workspace.batch)
    k = min(capture.top_k, m)
    kept: dict[str, Any] = {name: torch.empty(n, dtype=torch.float64) for name in ("squared_norms", "diagonal")}
    kept |= {"top": torch.empty(n, k, dtype=torch.int64)}
    wanted, tally, entries = _wanted(question, batch, workspace), BlockTally(), list[Entry]()
    prompts = [record.provenance.global_prompt_id for record in workspace.batch]
    names = [*map(_identity, workspace.batch)]
    vectors = analyses.context.vectors
    for block in blocks:
        at, K = block.at, block.kernel().to(dtype)
        if not workspace.has_norms:
            workspace.learn(func.SquaredNorms(block.columns("squared_norms"), block.columns("diagonal")))
        C = K * weights.to(K)
        cosine = cosines(K, block.rows("diagonal"), workspace.norms.weighted)
        if "batch" not in kept:
            kept |= {name: K.new_empty(n) for name in ("batch", *vectors)}
            kept |= {"top_contributions": K.new_empty(n, k)}
            kept |= {name: K.new_empty(n, m) for name in ("kernel", "contributions") if capture.kernel}
        kept["batch"][at] = C.sum(1)
        for name in ("squared_norms", "diagonal", *vectors):
            kept[name][at] = block.rows(name).to(kept[name])
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
        analyses.add(block)
        on_progress(len(at))
    place = {name: i for i, name in enumerate(batch.ids)}
    entries.sort(key=lambda entry: (place[entry.row], workspace.index[entry.column]))
    facts = {"blocks": tally.blocks._asdict()}
    return {**kept, "update_diagonal": workspace.norms.weighted, "selected": tuple(entries), "facts": facts}


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
