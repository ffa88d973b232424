"""One batch E against a workspace: rows of K stream by, and what is asked of them is kept.

    C_eu = c w_u A_u K_eu,   batch_e = Σ_u C_eu;   momentum, decay, curvature and the realised change by passes over E

Where nothing is asked that needs K, batch = J_E (P J_Uᵀ(c w A)) is one jvp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from fkernel import func, tree
from fkernel.errors import BatchError, RolloutError
from fkernel.func.contract import tile_bytes
from fkernel.func.gradient import plan_of
from fkernel.func.handles import stack_handles
from fkernel.kernel import realised_change
from fkernel.kernel.budget import parse_bytes
from fkernel.kernel.planning import usual_microbatch
from fkernel.kernel.planning.passes import fit, forward, reverse, twice_forward
from fkernel.kernel.planning.strategy import USABLE
from fkernel.kernel.recycling import recycled
from fkernel.kernel.sides import Ordered, cuts_of, pieces_of
from fkernel.precond import AdamWState, AdamWStep
from fkernel.rollout.batch import GeneratedBatch
from fkernel.shapes import Tensor, Tree
from fkernel.study.diagnostics import BlockTally, cosines, top_contributors
from fkernel.study.gradients import within
from fkernel.study.outcome import Entry, RequestResult, info_of
from fkernel.study.requests import CapturePlan
from fkernel.study.workspace import KernelWorkspace, selected, tokens_of

HELD = 1 << 30
"""Bytes of E's gradients that are held at a time where no memory was granted."""


class Policy(NamedTuple):
    """A checkpoint as the engine takes it.

    Attributes:
        f: S, (params, batch) -> [n].
        params: θ.
        state: AdamW's state before the step, of these parameters; or None.
        after: θ after the step, where it was really taken; or None.
    """

    f: func.Objective
    params: Tree
    state: AdamWState | None
    after: Tree | None


class Grant(NamedTuple):
    """What may be under way at once.

    Attributes:
        microbatch: sequences of the greatest length in a pass.
        memory: bytes for gradients and activations; None where none were granted.
    """

    microbatch: int
    memory: int | None


def grant_of(memory: int | str | None, microbatch: int | None, policy: Policy, batch: Any) -> Grant:
    """Find the largest microbatch whose passes stay within a grant.

    Raises:
        BatchError: one sequence at a time does not; it says what would be needed.
    """
    wanted = usual_microbatch(microbatch, batch)
    if memory is None:
        return Grant(wanted, None)
    passes = (reverse, forward, twice_forward)
    m, needed = fit(memory, wanted, policy.f, policy.params, (batch,), passes, vectors=0)
    if parse_bytes(memory) < needed:
        raise BatchError(f"memory={memory!r} cannot hold one sequence's activations; give at least {needed} bytes.")
    return Grant(m, parse_bytes(memory))


def room_of(grant: Grant, workspace: KernelWorkspace) -> int:
    """Bytes of gradients that may be held at once: what a grant leaves beside a pass, one of U and tiles."""
    if grant.memory is None:
        return HELD
    beside = 2 * workspace.gradients.largest + tile_bytes(2 * grant.microbatch, 8)
    return max(1, int(USABLE * grant.memory) - beside)


class Rows(NamedTuple):
    """Some rows of K.

    Attributes:
        at: [r] which rows.
        K: [r n_U].
        norms: of the rows' gradients.
    """

    at: Tensor
    K: Tensor
    norms: func.SquaredNorms


def kernel_rows(batch: Any, workspace: KernelWorkspace, policy: Policy, grant: Grant) -> Iterator[Rows]:
    """Walk K_EU a few rows at a time; E's gradients are computed, U's are read."""
    side = Ordered("E", batch)
    cuts = cuts_of(side, grant.microbatch * max(side.tokens))
    pieces = pieces_of(policy.f, policy.params, side, cuts, plan_of(policy.f, policy.params, batch))
    for block, held in within(room_of(grant, workspace), pieces, len(cuts)):
        J = stack_handles(held)
        at = torch.cat([side.order[cuts[i]] for i in block])
        norms = func.SquaredNorms(*(each.cpu() for each in func.squared_norms(J, diagonal=workspace.P.d)))
        yield Rows(at, workspace.gradients.rows_against(J, workspace.P), norms)
        del J, held  # or they would be alive while the next ones are made


def own_rows(workspace: KernelWorkspace, own: Tensor, grant: Grant) -> Iterator[Rows]:
    """Give rows of K_UU, for which no gradient is computed."""
    norms, K = workspace.norms, workspace.self_kernel(room_of(grant, workspace))
    yield Rows(torch.arange(len(own)), K[own], func.SquaredNorms(norms.plain[own], norms.weighted[own]))


class Question(NamedTuple):
    """What is asked of a batch, beside what it is.

    Attributes:
        name: the request's.
        kind: the request's.
        capture: what is computed and kept.
        advantages: other advantages than the step's, as `KernelWorkspace.weights_with` takes them.
        strict: whether an entry whose row this batch lacks is an error; what is captured of all requests is not.
    """

    name: str
    kind: str
    capture: CapturePlan
    advantages: Any = None
    strict: bool = True


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
    found: dict[str, Any] = {}
    with recycled():
        if capture.influence_only:
            towards = workspace.P(workspace.gradients.weighted_sum(weights))
            found["batch"] = func.jvp(policy.f, grant.microbatch)(policy.params, E, towards)
            tick(len(batch))
        else:
            own = workspace.rows_of(batch)
            rows = kernel_rows(E, workspace, policy, grant) if own is None else own_rows(workspace, own, grant)
            found |= _reduced(rows, question, batch, workspace, weights, tick)
        if step is not None:
            found |= _effects(E, policy, step, grant, capture, overridden=question.advantages is not None)
    facts = found.pop("facts", {}) | {"sampling": batch.diagnostics, "advantages": question.advantages}
    arrays: dict[str, Any] = {
        name: value.cpu().numpy() if isinstance(value, Tensor) else value for name, value in found.items()
    }
    return RequestResult(
        name=question.name,
        kind=question.kind,
        evaluation=tuple(map(info_of, batch)),
        update=tuple(map(info_of, workspace.batch)),
        facts=facts,
        **arrays,
    )


def _effects(
    E: Any, policy: Policy, step: AdamWStep, grant: Grant, capture: CapturePlan, overridden: bool
) -> dict[str, Tensor]:
    """Momentum, decay, curvature and the realised change, [n_E] each."""
    f, params, m = policy.f, policy.params, grant.microbatch
    along = func.jvp(f, m)
    found = {"momentum": along(params, E, step.momentum), "decay": along(params, E, step.decay)}
    if overridden:
        return found  # the step that was taken is another one
    if capture.curvature:
        found["curvature"] = 0.5 * func.curvature(f, m)(params, E, step.total)
    if capture.realised:
        after = policy.after or tree.add(params, step.total)
        found["realised"] = realised_change(f, params, after, E, microbatch=m)
    return found


def _reduced(
    rows: Iterator[Rows],
    question: Question,
    batch: GeneratedBatch,
    workspace: KernelWorkspace,
    weights: Tensor,
    tick: Callable[[int], Any],
) -> dict[str, Any]:
    """Take rows of K as they come; keep what was asked for."""
    capture, n, m = question.capture, len(batch), len(workspace.batch)
    k = min(capture.top_k, m)
    columns = workspace.norms.weighted
    kept: dict[str, Any] = {name: torch.empty(n, dtype=torch.float64) for name in ("squared_norms", "diagonal")}
    kept |= {"top": torch.empty(n, k, dtype=torch.int64)}
    wanted, tally, entries = _wanted(question, batch, workspace), BlockTally(), list[Entry]()
    prompts = [record.provenance.global_prompt_id for record in workspace.batch]
    for at, K, norms in rows:
        C = K * weights.to(K)
        cosine = cosines(K, norms.weighted, columns)
        if "batch" not in kept:
            kept |= {"batch": K.new_empty(n), "top_contributions": K.new_empty(n, k)}
            kept |= {name: K.new_empty(n, m) for name in ("kernel", "contributions") if capture.kernel}
        kept["batch"][at], kept["squared_norms"][at], kept["diagonal"][at] = C.sum(1), norms.plain, norms.weighted
        kept["top"][at], kept["top_contributions"][at] = top_contributors(C, k)
        if capture.kernel:
            kept["kernel"][at], kept["contributions"][at] = K, C
        own = [batch.records[e].provenance.global_prompt_id for e in at.tolist()]
        tally.add(K, cosine, torch.tensor([[a == b for b in prompts] for a in own]))
        for r, e in enumerate(at.tolist()):
            for u in wanted.get(e, ()):
                ids = batch.ids[e], workspace.batch.ids[u]
                entries.append(Entry(*ids, float(K[r, u]), float(cosine[r, u]), float(C[r, u])))
        tick(len(at))
    place = {name: i for i, name in enumerate(batch.ids)}
    entries.sort(key=lambda entry: (place[entry.row], workspace.index[entry.column]))
    facts = {"blocks": tally.blocks._asdict()}
    return {**kept, "update_diagonal": columns, "selected": tuple(entries), "facts": facts}


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
