"""A run of AdamW steps, accounted for: what every sequence of every step did to E, in its step and by momentum later.

    S_e(θ_T + Δθ_T) − S_e(θ_1) = Σ_t Σ_u C_eu + before_e + decay_e + arithmetic_e + unexplained_e + remainder_e

Steps are walked backwards with one adjoint for each sequence of E; `fkernel.engine.adjoint` has the derivation. A step
costs two passes over U (one where its gradients fit beside the adjoints) and one over E for each node of the path.

    bytes    (n_E + about 10) vectors of the parameters' size, and one microbatch's gradients
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from math import ceil
from typing import Any, NamedTuple

import torch

from fkernel import tree
from fkernel.boundary import public
from fkernel.distributed import Group, ShardedTree
from fkernel.engine.adjoint import Adjoints, RunStep, StepColumns
from fkernel.engine.batching import SortedBatch, check_sides, error_context
from fkernel.engine.layerwise import must_cut
from fkernel.engine.over_ranks import over, ranks_of
from fkernel.engine.params_in_shards import own_part
from fkernel.engine.path import NODES, Path, check_path
from fkernel.engine.planning import LONG, Strategy, bytes_in_shards, bytes_of, usual_microbatch, walk_of
from fkernel.engine.planning.passes import max_microbatch, reverse
from fkernel.engine.planning.strategy import USABLE
from fkernel.engine.recycling import kept_or_returned
from fkernel.engine.step_gradients import VECTORS, Passes
from fkernel.engine.step_over_ranks import agreed_step
from fkernel.engine.sums import values
from fkernel.errors import BatchError
from fkernel.func.inputs import Function, bare, check_weights, length, take, translate_errors
from fkernel.func.layers import cut_of
from fkernel.func.taps import handles_of
from fkernel.func.trust import plan_of
from fkernel.io import parse_bytes
from fkernel.precond import check_covers
from fkernel.shapes import Tensor, Tree


class RunAccount(NamedTuple):
    """What happened to S of every sequence of E over a run, in nats, float64; steps in the order of the run.

    Attributes:
        contributions: of each step, [n_E n_U_t]: what sequence u did from its step to the end of the run.
        before: [n_E] of what the optimizer remembered before the first step.
        decay: [n_E] of weight decay.
        arithmetic: [n_E] of the training's own precision, where the steps say what was `executed`; else 0.
        unexplained: [n_E] of moves and moments that are neither: a wrong record, or arithmetic where that is not known.
        realised: [n_E] S after the last step − S before the first.
        by_step: [n_E T] ⟨ḡ_et, Δθ_t⟩, what happened in each step.
        own: [n_E T] of it, what step t's own gradient did in step t.
        momentum: [n_E T] of it, what the optimizer remembered: earlier sequences, and what was there before.
        older: [n_E A] of momentum over all steps, what is of gradients of each age or more, ages as in `RunStep.older`.
        path: where E's gradients were evaluated.
    """

    contributions: list[Tensor]
    before: Tensor
    decay: Tensor
    arithmetic: Tensor
    unexplained: Tensor
    realised: Tensor
    by_step: Tensor
    own: Tensor
    momentum: Tensor
    older: Tensor
    path: str

    @property
    def accounted(self) -> Tensor:
        """[n_E] Σ contributions + before + decay + arithmetic + unexplained: the sum of `by_step`, to rounding."""
        others = self.before + self.decay + self.arithmetic + self.unexplained
        return sum((C.sum(1) for C in self.contributions), others)

    @property
    def remainder(self) -> Tensor:
        """[n_E] what is left of the realised change: the error of the paths."""
        return self.realised - self.accounted


class Sweep(NamedTuple):
    """An account between two of its steps: all that the steps still to come need. Kept, it survives a kill.

    Attributes:
        done: accounts of the parts of E that are finished.
        taken: steps that this part of E has been taken back over.
        rows: β1 p of this part, {name: [n *shape]}, as the next step finds them.
        columns: of the steps taken, last first.
        after: [n] S after the last step.
    """

    done: tuple[RunAccount, ...]
    taken: int
    rows: Tree
    columns: tuple[StepColumns, ...]
    after: Tensor


@public
def account(
    f: Function,
    E: Any,
    steps: Iterable[RunStep],
    *,
    path: Path = "midpoint",
    memory: int | str | None = None,
    microbatch: int | None = None,
    on_step: Callable[[Sweep], Any] | None = None,
    resume: Sweep | None = None,
    mesh: Any = None,
) -> RunAccount:
    """Account for a run of AdamW steps: what each of its sequences did to E, momentum credited to those that made it.

    S_e(θ_T+Δθ_T) − S_e(θ_1) = Σ_t Σ_u C_eu + before_e + decay_e + arithmetic_e + unexplained_e + remainder_e, as
    derived in `fkernel.engine.adjoint`.

    Args:
        f: S of E, (params, batch) -> [n_E], nats; or another observable, whose unit all columns then have.
        E: the sequences whose change is to be explained.
        steps: the run's steps from the last to the first. An iterator may load each when it is asked for: one step is
            held at a time, with θ and m of the one after it.
        path: where E's gradients are evaluated in each step, as in `explain_step`.
        memory: budget as in `kernel`, beside what a step holds. The sweep takes a vector of the parameters' size for
            each sequence of E, and about ten more. Where they do not fit, E is split, and each part sweeps over the run
            by itself: `steps` must then be something that can be iterated again, such as a list.
        microbatch: as in `fkernel.kernel`.
        on_step: called after every step with the sweep as it stands. Its rows are changed in place by the next one.
        resume: a sweep to go on from; f, E, steps, path and memory are those that it was made with.
        mesh: as in `fkernel.kernel`; every vector of a step may be in shards. A sweep's rows are this rank's shards of
            the adjoints: keep each rank's own.

    Returns:
        RunAccount.

    Raises:
        BatchError: no step, steps that do not follow each other backwards, a budget that is too small, or several
            sweeps over an iterator.
        TreeError, ModelError, NonFiniteError, OptimizerStateError: as `explain_step`.

    Example:
        >>> import torch
        >>> from fkernel import precond
        >>> f = lambda params, x: x @ params["w"]
        >>> params = {"w": torch.zeros(2)}
        >>> state = precond.adamw_init(params, lr=0.1, weight_decay=0.0)
        >>> step = RunStep(f, params, torch.eye(2), torch.tensor([1.0, -1.0]), state)
        >>> account(f, torch.eye(2), [step]).contributions[0].float()
        tensor([[ 0.1000, -0.0000],
                [ 0.0000, -0.1000]])
    """
    given = {"E": E, "path, memory and microbatch": [path, str(memory), microbatch], "the sweep": _progress(resume)}
    with over(mesh, "account", given) as group:
        return _account(f, E, steps, path, memory, microbatch, on_step, resume, group)


def _account(
    f: Function,
    E: Any,
    steps: Iterable[RunStep],
    path: Path,
    memory: int | str | None,
    microbatch: int | None,
    on_step: Callable[[Sweep], Any] | None,
    resume: Sweep | None,
    group: Group | None,
) -> RunAccount:
    check_path(path)
    again = iter(steps)
    last = next(again, None)
    if last is None:
        raise BatchError("steps holds no step; account needs at least one, the run's last first.")
    first = agreed_step(last, group)
    _check(f, E, first)
    n, (block, passes) = length(E), _planned(f, E, first, path, memory, microbatch, group)
    memory_kept = kept_or_returned(group)
    del first
    if block < n and again is steps:
        raise BatchError(
            f"memory={memory!r} holds {block} of E's {n} sequences at a time, so that the run is swept over "
            f"{ceil(n / block)} times, but steps is an iterator, which runs once; give a list, or an object whose "
            f"__iter__ begins again, or more memory."
        )
    run: Iterable[RunStep] = chain(iter((last,)), again)
    del last  # an exhausted iterator over it holds nothing
    accounts = list[RunAccount](() if resume is None else resume.done)
    with memory_kept:
        for i, start in enumerate(range(0, n, block)):
            if i < len(accounts):
                continue
            part = E if block >= n else take(E, slice(start, start + block))
            begun = resume if resume is not None and i == len(resume.done) else None
            begun = begun or Sweep((*accounts,), 0, {}, (), torch.empty(0))
            accounts.append(_sweep(f, part, run, passes, begun, on_step))
            run = steps
    return accounts[0] if len(accounts) == 1 else _joined(accounts)


def _progress(sweep: Sweep | None) -> list[int]:
    """How far a sweep has come: (parts of E, steps)."""
    return [0, 0] if sweep is None else [len(sweep.done), sweep.taken]


def _sweep(
    f: Function,
    E: Any,
    steps: Iterable[RunStep],
    passes: Passes,
    begun: Sweep,
    on_step: Callable[[Sweep], Any] | None,
) -> RunAccount:
    """Walk the run backwards, from where it was begun."""
    adjoints, m = Adjoints(SortedBatch("E", E, f), passes), usual_microbatch(passes.microbatch, E)
    columns, start, after, seen = [*begun.columns], None, begun.after, 0
    group = passes.group
    for given in steps:
        step = agreed_step(given, group)
        del given
        _check(f, E, step)
        start, seen = (step.params, step.state.exp_avg), seen + 1
        if seen == begun.taken:
            adjoints.resume(step, begun.rows)
        if seen <= begun.taken:
            continue
        with error_context(f"step {step.number}"):
            own, delta = adjoints.back(step)
        if seen == 1:
            after = values(f, _moved(step.params, delta), E, m, group)
        columns.append(own)
        del step, delta  # frees them before the next is loaded
        if on_step is not None:
            on_step(Sweep(begun.done, seen, adjoints.rows, (*columns,), after))
    assert start is not None
    before, realised = -adjoints.along(start[1]), (after - values(f, start[0], E, m, group)).cpu()
    C, *others = zip(*reversed(columns), strict=True)
    own, momentum, decay, *rest = (torch.stack(each, 1) for each in others)
    arithmetic, unexplained, arithmetic_later, unexplained_later, older = rest
    return RunAccount(
        contributions=[*C],
        before=before,
        decay=decay.sum(1),
        arithmetic=(arithmetic + arithmetic_later).sum(1),
        unexplained=(unexplained + unexplained_later).sum(1),
        realised=realised,
        by_step=own + momentum + decay + arithmetic + unexplained,
        own=own,
        momentum=momentum,
        older=older.sum(1),
        path=passes.path,
    )


def _joined(accounts: list[RunAccount]) -> RunAccount:
    """Put the accounts of E's parts below each other."""
    first, *columns = [field for field in RunAccount._fields if field != "path"]
    blocks = zip(*(getattr(one, first) for one in accounts), strict=True)
    rows = {field: torch.cat([getattr(one, field) for one in accounts]) for field in columns}
    return RunAccount([torch.cat(parts) for parts in blocks], **rows, path=accounts[0].path)


def _moved(params: Tree, delta: Tree) -> Tree:
    """Return θ + Δθ, in shards where θ is."""
    return params.moved(delta) if isinstance(params, ShardedTree) else tree.axpy(1.0, delta, params)


def _check(f: Function, E: Any, step: RunStep) -> None:
    """Raise unless a step's inputs fit each other."""
    with error_context(f"step {step.number}"):
        check_sides(step.f, step.params, E, step.U, f)
        check_weights(step.weights, length(step.U))
    θ = own_part(step.params)
    check_covers(step.state, list(θ), θ, "params")
    if step.delta is not None:
        tree.check_same(step.delta, θ, "delta", "params")
    if step.executed is not None:
        tree.check_same(step.executed.delta, θ, "executed.delta", "params")
        check_covers(step.state, [*step.executed.exp_avg], step.executed.exp_avg, "executed.exp_avg")


def _planned(
    f: Function,
    E: Any,
    step: RunStep,
    path: str,
    memory: int | str | None,
    microbatch: int | None,
    group: Group | None,
) -> tuple[int, Passes]:
    """Choose how many sequences of E a sweep takes, by what the run's last step needs."""
    n, P, ranks = length(E), bytes_of(own_part(step.params)), ranks_of(group) or 1
    ranks = 1 if isinstance(step.params, ShardedTree) else ranks  # whose vectors are shards, rows alike
    if memory is None:
        return n, Passes(path, microbatch, None, n * P, group)
    budget, vectors = parse_bytes(memory), VECTORS + len(NODES[path]) + 2 * len(step.older)
    passing = max(_pass_bytes(f, step.params, E), _pass_bytes(step.f, step.params, step.U))
    if (needed := ceil((passing + vectors * P + P // ranks) / USABLE)) > budget:
        raise BatchError(
            f"memory={memory!r} cannot hold {vectors + 1} vectors of {tree.size(step.params)} parameters and one "
            f"sequence's passes; give at least {needed} bytes."
        )
    sweeps = ceil(n / min(n, int(budget * USABLE - passing - vectors * P) * ranks // P))
    return ceil(n / sweeps), Passes(path, microbatch, budget, 0, group)


def _pass_bytes(f: Function, params: Tree, batch: Any) -> int:
    """Estimate the bytes of the longest sequence's gradients and of the passes that compute them."""
    side = SortedBatch("the batch", batch, f)
    longest, b = {"E": side.tokens[:1], "U": side.tokens[:1]}, next(iter(params.values())).element_size()
    with error_context("a step's batches"), translate_errors(params):
        if isinstance(params, ShardedTree):
            walk = walk_of(must_cut(f, params, side.batch), params, longest)
            return bytes_in_shards(walk, longest, b, params.group.size, Strategy("layers", "E", None, None, 0))
        cut = cut_of(f, params, side.batch) if side.tokens[0] > LONG else "short"
        if not isinstance(cut, str):
            return walk_of(cut, params, longest).memory(longest, b, 1, 0)
        plan = plan_of(f, params, side.batch)

    def handles(f: Function, params: Tree, batch: Any) -> Any:
        return handles_of(bare(f), params, batch, plan)

    return max_microbatch(1, 1, f, params, (side.batch,), (reverse, handles), vectors=0).needed
