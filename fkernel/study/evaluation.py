"""Evaluate one batch E against a workspace, in blocks of rows of K.

    C_eu = c w_u A_u ⟨ḡ_e, P ∇S_u⟩,   batch_e = Σ_u C_eu,   ḡ_e at the nodes of the step's path (`fkernel.engine.path`)
    momentum_e = ⟨ḡ_e, Δθ_momentum⟩,  decay_e = ⟨ḡ_e, Δθ_decay⟩
    part_e = ⟨ḡ_e, P c · that part's share of −∇L⟩, where the step's loss has several (`fkernel.study.loss_terms`)

All are computed in one pass over E's and U's gradients. Where nothing needs K, U's gradients are read only for their
weighted sum: batch_e = ⟨ḡ_e, P J_Uᵀ(c w A)⟩.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from fkernel import func
from fkernel.engine import KernelBlock, kept_or_returned
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
from fkernel.study.log import doing
from fkernel.study.loss_terms import PART, parts_of, with_parts
from fkernel.study.outcome import Entry, RequestResult, info_of
from fkernel.study.rows import MemoryBudget, Policy, walked
from fkernel.study.workspace import KernelWorkspace, selected, tokens_of

EXECUTED = "the step executed here"
"""`facts["realised_on"]` where θ' is computed rather than loaded, which does not test the optimizer state."""


class Question(NamedTuple):
    """A request without its batch.

    Attributes:
        name: the request's.
        kind: the request's.
        capture: what is computed and stored.
        advantages: other advantages than the step's, as `KernelWorkspace.weights_with` takes them.
        strict: whether a pair with an unknown row is an error; not where the capture is shared by all requests.
        analyses: the analyses.
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
        question: the request.
        batch: E.
        workspace: U.
        policy: the checkpoint.
        step: Δθ; None where there is no optimizer state, or P is not calibrated: then nothing is predicted.
        grant: the microbatch and the memory limit.
        on_progress: called with the number of sequences of E done since the last call.

    Raises:
        FKernelError: a sequence cannot be scored, a gradient is not finite (the message has its id), or a requested id
            is unknown.
    """
    capture = question.capture
    weights = workspace.weights_with(question.advantages)
    E = tokens_of(batch, policy.params)
    context = RequestContext(
        batch, E, workspace, policy, step, grant, capture, weights, question.advantages, question.strict
    )
    effects, analyses = context.effects, AnalysisRunner(question.analyses, context)
    needs_K = not capture.influence_only or question.analyses.of_rows
    with kept_or_returned(grant.group), doing(f"{question.name}: what is contracted"):
        spec = analyses.ask(_products(context, needs_K))
    with kept_or_returned(grant.group):  # a second block: memory freed by those vectors is returned first
        own = None if policy.through_detach or policy.path != "start" else workspace.rows_of(batch)
        blocks = walked(E, workspace, policy, grant, spec, own)
        with doing(f"{question.name}: gradients and contraction"):
            if needs_K:
                effects |= _reduced(blocks, question, batch, workspace, weights, on_progress, analyses, context.dtype)
            else:
                effects |= _without_kernel(blocks, context, ("batch", *context.vectors))
                on_progress(len(batch))
        effects |= with_parts(effects, workspace.loss)
        with doing(f"{question.name}: what really changed"):
            effects |= context.measured(policy.f, E)
        answers = analyses.results()
    facts = effects.pop("facts", {}) | {"sampling": batch.diagnostics, "advantages": question.advantages}
    facts["path"] = policy.path
    if policy.verdict is not None:
        facts["audit"] = policy.verdict
    if "realised" in effects:
        facts["realised_on"] = EXECUTED if policy.after is None else "step.after"
    arrays: dict[str, Any] = {
        name: value.cpu().numpy() if isinstance(value, Tensor) else value for name, value in effects.items()
    }
    parts = parts_of(arrays)
    arrays = {name: value for name, value in arrays.items() if not name.startswith(PART)}
    return RequestResult(
        name=question.name,
        kind=question.kind,
        evaluation=tuple(map(info_of, batch)),
        update=tuple(map(info_of, workspace.batch)),
        facts=facts,
        analyses=answers,
        parts=parts,
        **arrays,
    )


def _products(context: RequestContext, needs_K: bool) -> ProductSpec:
    """The products that every request needs; analyses add theirs."""
    workspace, vectors = context.workspace, dict(context.vectors)
    if not needs_K:
        vectors["batch"] = workspace.P(workspace.gradients.weighted_sum(context.weights.to(context.like)))
        return ProductSpec(x=RowSpec(vectors))
    norms: dict[str, Tree | None] = {"squared_norms": None, "diagonal": workspace.P.d}
    of_U = RowSpec() if workspace.has_norms else RowSpec(squares=norms)
    return ProductSpec({"": workspace.P.d}, RowSpec(vectors, norms), of_U)


def _without_kernel(blocks: Iterator[KernelBlock], context: RequestContext, names: Iterable[str]) -> dict[str, Tensor]:
    """Collect products of E's gradients with single vectors, [n_E] each."""
    effects = {name: torch.empty(len(context.batch), dtype=context.dtype) for name in names}
    for block in blocks:
        for name, values in effects.items():
            values[block.at] = block.rows(name).to(context.dtype)
    return effects


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
    """Reduce blocks of rows of K to what is captured."""
    capture, n, m = question.capture, len(batch), len(workspace.batch)
    k = min(capture.top_k, m)
    kept: dict[str, Any] = {name: torch.empty(n, dtype=torch.float64) for name in ("squared_norms", "diagonal")}
    kept |= {"top": torch.empty(n, k, dtype=torch.int64)}
    wanted, tally, entries = _wanted(question, batch, workspace), BlockTally(), list[Entry]()
    prompts = [record.provenance.global_prompt_id for record in workspace.batch]
    identities = [*map(_identity, workspace.batch)]
    vectors = analyses.context.vectors
    for block in blocks:
        rows, K = block.at, block.kernel().to(dtype)
        if not workspace.has_norms:
            workspace.learn(func.SquaredNorms(block.columns("squared_norms"), block.columns("diagonal")))
        C = K * weights.to(K)
        cosine = cosines(K, block.rows("diagonal"), workspace.norms.weighted)
        if "batch" not in kept:
            kept |= {name: K.new_empty(n) for name in ("batch", *vectors)}
            kept |= {"top_contributions": K.new_empty(n, k)}
            kept |= {name: K.new_empty(n, m) for name in ("kernel", "contributions") if capture.kernel}
        kept["batch"][rows] = C.sum(1)
        for name in ("squared_norms", "diagonal", *vectors):
            kept[name][rows] = block.rows(name).to(kept[name])
        kept["top"][rows], kept["top_contributions"][rows] = top_contributors(C, k)
        if capture.kernel:
            kept["kernel"][rows], kept["contributions"][rows] = K, C
        records = [batch.records[e] for e in rows.tolist()]
        same = torch.tensor(
            [[record.provenance.global_prompt_id == prompt for prompt in prompts] for record in records]
        )
        others = torch.tensor([[a != b for b in identities] for a in map(_identity, records)])
        tally.add(K[others], cosine[others], same[others])
        for r, e in enumerate(rows.tolist()):
            for u in wanted.get(e, ()):
                ids = batch.ids[e], workspace.batch.ids[u]
                entries.append(Entry(*ids, float(K[r, u]), float(cosine[r, u]), float(C[r, u])))
        analyses.add(block)
        on_progress(len(rows))
    row_of = {name: i for i, name in enumerate(batch.ids)}
    entries.sort(key=lambda entry: (row_of[entry.row], workspace.index[entry.column]))
    facts = {"blocks": tally.blocks._asdict()}
    return {**kept, "update_diagonal": workspace.norms.weighted, "selected": tuple(entries), "facts": facts}


def _identity(record: SequenceRecord) -> tuple[str, str]:
    """Equal only for the same sequence: its id and the hash of its tokens."""
    return record.sequence_id, record.content_hash


def _wanted(question: Question, batch: GeneratedBatch, workspace: KernelWorkspace) -> dict[int, list[int]]:
    """Entries of K that the capture names: {row: columns}."""
    capture = question.capture
    row_of = {name: i for i, name in enumerate(batch.ids)}
    pairs = set[tuple[int, int]]()
    for row, column in capture.pairs:
        if row not in row_of and not question.strict:
            continue
        if row not in row_of:
            raise RolloutError(f"The pair [{row}, {column}] names a row that is no sequence of this request.")
        pairs.add((row_of[row], workspace.row(column)))
    for block in capture.submatrices:
        rows = selected(batch.ids, block.rows, "this request", question.strict)
        columns = selected(workspace.batch.ids, block.columns, "the update batch")
        pairs |= {(row_of[e], workspace.index[u]) for e in rows for u in columns}
    wanted: dict[int, list[int]] = {}
    for e, u in sorted(pairs):
        wanted.setdefault(e, []).append(u)
    return wanted
