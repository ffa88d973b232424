"""Rows of K, a few at a time: E's gradients are computed, U's are read; the checkpoint and the grant they need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from fkernel import func
from fkernel.engine.budget import parse_bytes
from fkernel.engine.planning import usual_microbatch
from fkernel.engine.planning.passes import fit, forward, reverse, twice_forward
from fkernel.engine.planning.strategy import USABLE
from fkernel.engine.sides import Ordered, cuts_of, pieces_of
from fkernel.errors import BatchError
from fkernel.func.certified import plan_of
from fkernel.func.contract import tile_bytes
from fkernel.func.handles import Handles, at, stack_handles
from fkernel.precond import AdamWState
from fkernel.shapes import Tensor, Tree
from fkernel.study.gradients import within
from fkernel.study.workspace import KernelWorkspace

HELD = 1 << 30
"""Bytes of E's gradients that are held at a time where no memory was granted."""


class Unselected(NamedTuple):
    """Parameters that a plan did not select and that moved, {name: [*shape]} each, of the same names.

    Attributes:
        before: as the checkpoint has them.
        after: as they are after the step.
    """

    before: Tree
    after: Tree


class Policy(NamedTuple):
    """A checkpoint as the engine takes it.

    Attributes:
        f: S, (params, batch) -> [n].
        params: θ.
        state: AdamW's state before the step, of these parameters; or None.
        after: θ after the step, where it was really taken; or None.
        apply: (params, input_ids, attention_mask) -> logits.
        temperature: of S.
        tokenizer: Hugging Face's.
        trained: apply, differentiated as training does: `func.as_trained`.
        columns: f of `trained`, whose gradients are U's.
        through_detach: whether E's derivative goes through what the model detaches, which U's gradients do not.
        unused: parameters that the loss of the step never uses, so that its optimizer leaves them alone; known once U's
            workspace is prepared.
        padding_idx: the token whose embedding row training withholds the gradient of; None where it is not trained.
        unselected: gives the parameters that were not selected and that the step moved all the same, before and after
            it; empty where there are none, or where the step was not really taken. Loaded once, when first called.
    """

    f: func.Objective
    params: Tree
    state: AdamWState | None
    after: Tree | None
    apply: Any = None
    temperature: float = 1.0
    tokenizer: Any = None
    trained: Any = None
    columns: Any = None
    padding_idx: int | None = None
    unselected: Callable[[], Unselected] = lambda: Unselected({}, {})
    through_detach: bool = False
    unused: frozenset[str] = frozenset()


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
        handles: gives the rows' gradients; while these rows are the current ones only.
    """

    at: Tensor
    K: Tensor
    norms: func.SquaredNorms
    handles: Callable[[], Handles]


def kernel_rows(batch: Any, workspace: KernelWorkspace, policy: Policy, grant: Grant) -> Iterator[Rows]:
    """Walk K_EU a few rows at a time; E's gradients are computed, U's are read."""
    side = Ordered("E", batch, policy.f, plan_of(policy.f, policy.params, batch))
    cuts = cuts_of(side, grant.microbatch * max(side.tokens))
    pieces = pieces_of(policy.params, side, cuts)
    for block, held in within(room_of(grant, workspace), pieces, len(cuts)):
        J = stack_handles(held)
        places = torch.cat([side.order[cuts[i]] for i in block])
        norms = func.SquaredNorms(*(each.cpu() for each in func.squared_norms(J, diagonal=workspace.P.d)))
        current = [J]
        yield Rows(places, workspace.gradients.rows_against(J, workspace.P), norms, partial(current.__getitem__, 0))
        current.clear()
        del J, held  # or they would be alive while the next ones are made, whoever keeps these rows


def own_rows(workspace: KernelWorkspace, own: Tensor, grant: Grant) -> Iterator[Rows]:
    """Walk rows of K_UU, a microbatch of U at a time; no gradient is computed."""
    norms, K = workspace.norms, workspace.self_kernel(room_of(grant, workspace))
    for rows, read in workspace.gradients.blocks():
        chosen = (own[:, None] == rows).nonzero()  # (place in the request, place in the microbatch)
        if len(chosen):
            here, place = own[chosen[:, 0]], chosen[:, 1]
            norm = func.SquaredNorms(norms.plain[here], norms.weighted[here])
            yield Rows(chosen[:, 0], K[here], norm, lambda read=read, place=place: taken(read(), place))


def taken(handles: Handles, place: Tensor) -> Handles:
    """Take some sequences of one microbatch's gradients."""
    return {name: at(handle, place) for name, handle in handles.items()}  # pyright: ignore[reportArgumentType]
