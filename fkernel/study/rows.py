"""The policy as the engine's inputs, memory budgets, and the pass over a request's rows of K."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from fkernel import func
from fkernel.distributed import Group, ShardedTree, from_first
from fkernel.engine import (
    KernelBlock,
    Nodes,
    Problem,
    ShardedGradients,
    SortedBatch,
    WalkedGradients,
    blocks,
    choose_alone,
    choose_walk,
    contraction,
    nodes_of,
    problem_of,
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
from fkernel.precond import OptimizerState
from fkernel.shapes import Tree
from fkernel.study.loss_terms import Columns, LossTerms, columns_of
from fkernel.study.workspace import KernelWorkspace

STEP = ("momentum", "decay")
"""Parts of the step whose effects every request has."""


class Unselected(NamedTuple):
    """Parameters that the plan does not select and the step changed, {name: [*shape]} each, of the same names.

    Attributes:
        before: before the step.
        after: after the step.
    """

    before: Tree
    after: Tree


class Policy(NamedTuple):
    """A checkpoint as the engine's inputs.

    Attributes:
        f: S, (params, batch) -> [n].
        params: θ.
        state: AdamW's state before the step, of these parameters; or None.
        after: θ after the step, of the checkpoint after it; or None.
        apply: (params, input_ids, attention_mask) -> logits.
        temperature: of S.
        tokenizer: Hugging Face's.
        trained: apply, differentiated as training does: `func.with_masked_padding_grad`.
        columns: f of `trained`, whose gradients are U's.
        through_detach: whether E's derivative goes through the model's detached tensors; U's does not.
        unused: parameters that the step's loss never uses, so that the optimizer skips them; set by `prepared`.
        padding_idx: the token whose embedding row gets no gradient in training; None where there is none.
        path: where E's gradients are evaluated, a key of `fkernel.engine.path.NODES`.
        step: Δθ; None where nothing is predicted, and E's gradients are evaluated at θ.
        departures: {"arithmetic": v, "unexplained": v} of the step, those that are known: what the training's own
            precision did that real numbers would not, and what the step really taken has beyond that.
        verdict: of the audit of the step really taken; None without `step.after`.
        unselected: returns the unselected parameters that the step changed, before and after it; empty where there are
            none, or without a checkpoint after the step. Loaded on the first call.
    """

    f: func.Objective
    params: Tree
    state: OptimizerState | None
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
    departures: Mapping[str, Tree] = {}
    verdict: str | None = None

    def columns_for(self, U: func.Sequences, terms: LossTerms | None) -> Columns:
        """The function whose gradients are U's; E's own f where the two are equal, so that it is certified once."""
        withheld = self.padding_idx is not None and bool(holding_inside(U, self.padding_idx).any())
        S = self.columns if withheld or self.through_detach else self.f
        return columns_of(S, self.trained, self.temperature, U, terms)

    @property
    def nodes(self) -> Nodes:
        """(weight, parameters) of each node of the path."""
        return nodes_of(self.path, self.params, self.step)


class MemoryBudget(NamedTuple):
    """How much is computed at once.

    Attributes:
        microbatch: sequences of the greatest length in a pass.
        memory: bytes for gradients and activations; None for no limit.
        f: the function that `load` was estimated for.
        load: its estimated memory and work; None without a limit.
        group: the ranks that compute together; None for this process alone.
    """

    microbatch: int
    memory: int | None
    f: Any = None
    load: Workload | None = None
    group: Group | None = None


def grant_of(
    memory: int | str | None,
    microbatch: int | None,
    policy: Policy,
    batch: Any,
    where: Where = "disk",
    group: Group | None = None,
) -> MemoryBudget:
    """Choose the largest microbatch with which a batch's gradients fit a memory limit.

    Args:
        memory: the limit.
        microbatch: an upper bound.
        policy: the checkpoint.
        batch: U or E.
        where: the gradients go; "memory" counts all of them within the limit.
        group: the ranks that compute together: rank 0 chooses, since choices depend on measured times.

    Raises:
        BatchError: one sequence at a time does not fit; the message says how much would.
    """
    if isinstance(policy.params, ShardedTree):  # all ranks walk layer by layer, and chose it together
        limit = None if memory is None else parse_bytes(memory)
        return MemoryBudget(usual_microbatch(microbatch, batch), limit, group=group)
    if group is not None:
        alone = partial(grant_of, memory, microbatch, policy, batch, where)
        chosen = from_first(group, "choosing a microbatch", lambda: alone().microbatch)
        return MemoryBudget(chosen, None if memory is None else parse_bytes(memory), group=group)
    wanted, budget = usual_microbatch(microbatch, batch), None if memory is None else parse_bytes(memory)
    if walking_alone(policy.f, policy.params, SortedBatch("", batch), memory):  # long sequences: one at a time
        return MemoryBudget(1, budget)
    if budget is None:
        return MemoryBudget(wanted, None)
    load = load_of(policy.params, SortedBatch("", batch, policy.f))
    plan = choose_making(load, budget, rates(_dtype(policy.params)), wanted, where)
    return MemoryBudget((plan.strategy.tokens or 1) // load.longest, budget, policy.f, load)


def _strategy(
    grant: MemoryBudget, policy: Policy, E: SortedBatch, workspace: KernelWorkspace, reserved: int
) -> Strategy:
    """Choose the tiles for E against U's stored gradients; where E has no f, its gradients are stored too."""
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
    """Compute the products of a batch's gradients with U's, in blocks of rows.

    Args:
        batch: E.
        workspace: U.
        policy: the checkpoint; E's gradients are evaluated at its nodes.
        grant: the microbatch and the memory limit.
        spec: the products; without kernels U is not read.
        own: [n_E] rows of U that hold E's gradients; nothing is recomputed then. None where E is not of U.
    """
    U = workspace.gradients
    if isinstance(U, ShardedGradients):
        return _over_ranks(batch, U, policy, grant, spec)
    # P and the step's parts are not counted in the limit; vectors made for this pass are.
    vectors = {**spec.kernels, **spec.x.along, **spec.x.squares}
    counted = {id(v) for name, v in vectors.items() if v is not None and name not in STEP} - {id(workspace.P.d)}
    reserved = len(counted) * bytes_of(policy.params)
    if isinstance(U, WalkedGradients):
        return _recomputed(batch, U, policy, grant, spec, reserved, own)
    E = SortedBatch("E", batch, None if own is not None else policy.f)
    how = _strategy(grant, policy, E, workspace, reserved)
    if own is not None:
        J = U if own.tolist() == list(range(len(U))) else U.chosen(own)
        return contraction(J, U if spec.kernels else None, spec, tile=how.tile, block=how.block)
    side = U.side if spec.kernels else None
    promised = grant.memory is not None
    return blocks(Problem(policy.params, E, side, spec, policy.path, policy.step, U, promised=promised), how)


def _recomputed(
    batch: Any, U: WalkedGradients, policy: Policy, grant: MemoryBudget, spec: ProductSpec, reserved: int, own: Any
) -> Iterator[KernelBlock]:
    """Recompute U's gradients, which are not stored, together with E's; once where E is U itself."""
    E, side, kept, params = SortedBatch("E", batch, policy.f), U.side if spec.kernels else None, None, policy.params
    if side is not None and own is not None and own.tolist() == list(range(len(U))):
        E = side
    if U.whole and isinstance(
        cut_of(policy.f, params, batch), str
    ):  # no layer-wise pass over this model: whole gradients
        kept, how = U, Strategy("sequences", "E", None, U.side.tokens[0], E.tokens[0])
    elif side is None:
        how = choose_alone(params, U.how)
    else:
        how = choose_walk(E, side, params, grant.memory, grant.microbatch, reserved)
    return blocks(problem_of(params, E, side, spec, path=policy.path, step=policy.step, kept=kept), how)


def _over_ranks(
    batch: Any, U: ShardedGradients, policy: Policy, grant: MemoryBudget, spec: ProductSpec
) -> Iterator[KernelBlock]:
    """Contract E's gradients, a round at a time, with U's that the ranks hold; K of all rows is one block."""
    E, side = SortedBatch("E", batch, policy.f), U.side if spec.kernels else None
    tokens = grant.microbatch * E.tokens[0]
    how = Strategy("sequences", "E" if side is None else "U", tokens if side is None else None, None, tokens)
    problem = Problem(policy.params, E, side, spec, path=policy.path, step=policy.step, kept=U, group=U.group)
    return blocks(problem, how)


def self_strategy(memory: int | str | None, workspace: KernelWorkspace, policy: Policy) -> Strategy | None:
    """Choose the tiles of K_UU; None where U's gradients are over several ranks, whose shards are contracted whole."""
    J, budget = workspace.gradients, None if memory is None else parse_bytes(memory)
    if isinstance(J, WalkedGradients):
        return choose_walk(J.side, J.side, policy.params, budget, 1)
    if not J.whole:
        return None
    tokens, ready = J.side.tokens, ready_of(workspace)
    if budget is None:
        return ungranted(tokens, ready, 1)
    return choose_tile(read_load(policy.params, tokens, ready), budget, rates(_dtype(policy.params))).strategy


def ready_of(workspace: KernelWorkspace) -> Ready:
    """Describe U's stored gradients for the planner."""
    U = workspace.gradients
    return Ready("memory" if workspace.directory is None else "disk", U.token_bytes, U.cuts[0].stop)


def _dtype(params: Tree) -> torch.dtype:
    return next(iter(params.values())).dtype
