"""The checkpoint as the engine takes it, what a grant allows, and the walk over a request's rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from fkernel import func
from fkernel.engine.budget import parse_bytes
from fkernel.engine.contraction import Block, contraction
from fkernel.engine.gradients import Gradients
from fkernel.engine.path import Nodes, nodes_of
from fkernel.engine.planning import Strategy, usual_microbatch
from fkernel.engine.planning.estimate import walking_of
from fkernel.engine.planning.passes import fit, reverse
from fkernel.engine.planning.strategy import USABLE
from fkernel.engine.problem import Problem, blocks
from fkernel.engine.sides import Ordered
from fkernel.errors import BatchError
from fkernel.func.contract import Asked
from fkernel.func.tiles import tile_bytes
from fkernel.precond import AdamWState
from fkernel.shapes import Tree
from fkernel.study.workspace import KernelWorkspace

HELD = 4 << 30
"""Bytes of gradients that are held at a time where no memory was granted; half of it is U's."""


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
        path: where E's gradients are taken: of `fkernel.engine.path.NODES`.
        step: Δθ; None where nothing is predicted, and then E's gradients are taken at θ.
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
    path: str = "start"
    step: Tree | None = None

    @property
    def nodes(self) -> Nodes:
        """(weight, parameters) of the path's nodes."""
        return nodes_of(self.path, self.params, self.step)


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
    if walking_of(policy.f, policy.params, (batch,), memory):  # long sequences go one by one
        return Grant(1, None if memory is None else parse_bytes(memory))
    if memory is None:
        return Grant(wanted, None)
    m, needed = fit(memory, wanted, policy.f, policy.params, (batch,), (reverse,), vectors=0)
    if parse_bytes(memory) < needed:
        raise BatchError(f"memory={memory!r} cannot hold one sequence's activations; give at least {needed} bytes.")
    return Grant(m, parse_bytes(memory))


def room_of(grant: Grant, workspace: KernelWorkspace) -> int:
    """Bytes of gradients that may be held at once: what a grant leaves beside a pass, one of U and tiles."""
    if grant.memory is None:
        return HELD
    beside = 2 * workspace.gradients.largest + tile_bytes(2 * grant.microbatch, 8)
    return max(1, int(USABLE * grant.memory) - beside)


def walked(
    batch: Any, workspace: KernelWorkspace, policy: Policy, grant: Grant, asked: Asked, own: Any = None
) -> Iterator[Block]:
    """Walk everything that is asked of a batch's gradients and U's, some rows at a time.

    Args:
        batch: E.
        workspace: U.
        policy: the checkpoint, whose nodes say where E's gradients are taken.
        grant: what may be under way at once.
        asked: what is asked; without kernels U is not read.
        own: [n_E] which rows of U they are, where E is U's own and taken where U's are; no gradient is computed then.
    """
    U, held = workspace.gradients, workspace.directory is None
    tile, block = _tokens(room_of(grant, workspace), U, held)
    if own is not None:
        J = U if own.tolist() == list(range(len(U))) else U.chosen(own)
        return contraction(J, U if asked.kernels else None, asked, tile=tile, block=block)
    side = Ordered("E", batch, policy.f)
    problem = Problem(
        policy.params,
        side,
        U.side if asked.kernels else None,
        asked,
        policy.path,
        policy.step,
        kept=U,
        promised=grant.memory is not None,
    )
    return blocks(problem, Strategy("sequences", "E", tile, block, grant.microbatch * max(side.tokens)))


def tile_of(grant: Grant, workspace: KernelWorkspace) -> int | None:
    """Tokens of U whose gradients are held on one side at a time."""
    return _tokens(room_of(grant, workspace), workspace.gradients, workspace.directory is None)[0]


def _tokens(room: int, U: Gradients, held: bool) -> tuple[int, int | None]:
    """Tokens of E and of U whose gradients have room; U's take none of it where they are held anyway."""
    tokens = max(1, int(room / U.token_bytes))
    return (tokens, None) if held else (max(1, tokens // 2), max(1, tokens // 2))
