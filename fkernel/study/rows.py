"""The checkpoint as the engine takes it, what a grant allows, and the walk over a request's rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from fkernel import func
from fkernel.engine import (
    ALONE,
    KernelBlock,
    Nodes,
    Problem,
    SortedBatch,
    WalkedGradients,
    blocks,
    choose_walk,
    contraction,
    nodes_of,
    walking_alone,
)
from fkernel.engine.planning import (
    Ready,
    Strategy,
    Where,
    Workload,
    bytes_of,
    choose_making,
    choose_meeting,
    choose_tile,
    load_of,
    rates,
    read_load,
    ungranted,
    usual_microbatch,
)
from fkernel.func.handles import ProductSpec
from fkernel.func.inputs import holding_inside
from fkernel.func.layers import cut_of
from fkernel.io import parse_bytes
from fkernel.precond import AdamWState
from fkernel.shapes import Tree
from fkernel.study.loss_terms import Columns, LossTerms, columns_of
from fkernel.study.workspace import KernelWorkspace

STEP = ("momentum", "decay")
"""Vectors of the step that every request asks about."""


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
        trained: apply, differentiated as training does: `func.with_masked_padding_grad`.
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

    def columns_for(self, U: func.Sequences, terms: LossTerms | None) -> Columns:
        """Find the function whose gradients are U's: E's, which is certified once then, where the two are the same."""
        withheld = self.padding_idx is not None and bool(holding_inside(U, self.padding_idx).any())
        S = self.columns if withheld or self.through_detach else self.f
        return columns_of(S, self.trained, self.temperature, U, terms)

    @property
    def nodes(self) -> Nodes:
        """(weight, parameters) of the path's nodes."""
        return nodes_of(self.path, self.params, self.step)


class MemoryBudget(NamedTuple):
    """What may be under way at once.

    Attributes:
        microbatch: sequences of the greatest length in a pass.
        memory: bytes for gradients and activations; None where none were granted.
        f: whose gradients were counted for it.
        load: what they take; None where nothing was counted.
    """

    microbatch: int
    memory: int | None
    f: Any = None
    load: Workload | None = None


def grant_of(
    memory: int | str | None, microbatch: int | None, policy: Policy, batch: Any, where: Where = "disk"
) -> MemoryBudget:
    """Ask the planner for the largest microbatch in which a batch's gradients can be made within a grant.

    Args:
        memory: the grant.
        microbatch: the largest that is wanted.
        policy: the checkpoint.
        batch: U or E.
        where: what is made goes; "memory" where all of it is held within the grant.

    Raises:
        BatchError: one sequence at a time does not fit; it says what would be needed.
    """
    wanted, budget = usual_microbatch(microbatch, batch), None if memory is None else parse_bytes(memory)
    if walking_alone(policy.f, policy.params, SortedBatch("", batch), memory):  # long sequences go one by one
        return MemoryBudget(1, budget)
    if budget is None:
        return MemoryBudget(wanted, None)
    load = load_of(policy.params, SortedBatch("", batch, policy.f))
    found = choose_making(load, budget, rates(_dtype(policy.params)), wanted, where)
    return MemoryBudget((found.strategy.tokens or 1) // load.longest, budget, policy.f, load)


def _strategy(
    grant: MemoryBudget, policy: Policy, E: SortedBatch, workspace: KernelWorkspace, reserved: int
) -> Strategy:
    """Ask the planner how E meets U's gradients, which are there; E's are too, where E has no f."""
    U, ready, params = workspace.gradients.side.tokens, ready_of(workspace), policy.params
    if grant.memory is None:
        return ungranted(E.tokens, ready, grant.microbatch)
    if E.f is None:
        load = read_load(params, U, ready).of(E.tokens, U, {"E": ready, "U": ready})
    else:
        counted = grant.load if grant.f is E.f and grant.load is not None else load_of(params, E)
        load = counted.of(E.tokens, U, {"U": ready})
    return choose_meeting(load, grant.memory, rates(_dtype(params)), grant.microbatch, reserved).strategy


def walked(
    batch: Any, workspace: KernelWorkspace, policy: Policy, grant: MemoryBudget, spec: ProductSpec, own: Any = None
) -> Iterator[KernelBlock]:
    """Walk everything that is asked of a batch's gradients and U's, some rows at a time.

    Args:
        batch: E.
        workspace: U.
        policy: the checkpoint, whose nodes say where E's gradients are taken.
        grant: what may be under way at once.
        spec: what is asked; without kernels U is not read.
        own: [n_E] which rows of U they are, where E is U's own and taken where U's are; no gradient is computed then.
    """
    U = workspace.gradients
    # P and the step's parts lie beside a grant; what else is asked about was made for this walk, and is within it.
    given = {**spec.kernels, **spec.x.along, **spec.x.squares}
    more = {id(v) for what, v in given.items() if v is not None and what not in STEP} - {id(workspace.P.d)}
    reserved = len(more) * bytes_of(policy.params)
    if isinstance(U, WalkedGradients):
        return _walked_again(batch, U, policy, grant, spec, reserved, own)
    E = SortedBatch("E", batch, None if own is not None else policy.f)
    how = _strategy(grant, policy, E, workspace, reserved)
    if own is not None:
        J = U if own.tolist() == list(range(len(U))) else U.chosen(own)
        return contraction(J, U if spec.kernels else None, spec, tile=how.tile, block=how.block)
    side = U.side if spec.kernels else None
    promised = grant.memory is not None
    return blocks(Problem(policy.params, E, side, spec, policy.path, policy.step, U, promised=promised), how)


def _walked_again(
    batch: Any, U: WalkedGradients, policy: Policy, grant: MemoryBudget, spec: ProductSpec, reserved: int, own: Any
) -> Iterator[KernelBlock]:
    """Walk U, whose gradients are not kept, beside E; where E is U itself it walks once."""
    E, side, kept, params = SortedBatch("E", batch, policy.f), U.side if spec.kernels else None, None, policy.params
    if side is not None and own is not None and own.tolist() == list(range(len(U))):
        E = side
    if isinstance(cut_of(policy.f, params, batch), str):  # E's derivative may be another: a whole gradient at a time
        kept, how = U, Strategy("sequences", "E", None, U.side.tokens[0], E.tokens[0])
    elif side is None:
        how = ALONE._replace(every=U.how.every)
    else:
        how = choose_walk(E, side, params, grant.memory, grant.microbatch, reserved)
    return blocks(Problem(params, E, side, spec, policy.path, policy.step, kept), how)


def self_strategy(memory: int | str | None, workspace: KernelWorkspace, policy: Policy) -> Strategy:
    """Ask the planner how U meets itself."""
    J, budget = workspace.gradients, None if memory is None else parse_bytes(memory)
    if isinstance(J, WalkedGradients):
        return choose_walk(J.side, J.side, policy.params, budget, 1)
    tokens, ready = J.side.tokens, ready_of(workspace)
    if budget is None:
        return ungranted(tokens, ready, 1)
    return choose_tile(read_load(policy.params, tokens, ready), budget, rates(_dtype(policy.params))).strategy


def ready_of(workspace: KernelWorkspace) -> Ready:
    """Describe gradients of U that are there."""
    U = workspace.gradients
    return Ready("memory" if workspace.directory is None else "disk", U.token_bytes, U.cuts[0].stop)


def _dtype(params: Tree) -> torch.dtype:
    return next(iter(params.values())).dtype
