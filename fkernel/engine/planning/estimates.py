"""Predicted memory, disk and time of every strategy for a kernel, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from fkernel.boundary import public
from fkernel.distributed import ShardedTree
from fkernel.engine.batching import check_sides
from fkernel.engine.planning.in_shards import choose_in_shards
from fkernel.engine.planning.machine import Rates, rates
from fkernel.engine.planning.over_ranks import choose_over_ranks
from fkernel.engine.planning.passes import bytes_of
from fkernel.engine.planning.strategy import EVERY, USABLE, Option, Strategy, cost, default, options, usual_microbatch
from fkernel.engine.planning.walking import walk_of
from fkernel.engine.planning.workloads import HALVES, LONG, Workload, workload
from fkernel.errors import BatchError, ModelError
from fkernel.func.inputs import (
    Function,
    check_batch,
    computed_like,
    is_half,
    length,
    lengths,
    token_counts,
    translate_errors,
)
from fkernel.func.layers import cut_of
from fkernel.io import parse_bytes
from fkernel.precond import Diagonal, Preconditioner
from fkernel.shapes import Tree

SHARDS = "params are in shards, so that f has to be computed layer by layer"
GATHER = "Give whole params: leaf.full_tensor() of a DTensor."


class Estimate(NamedTuple):
    """Predicted cost of a kernel.

    Attributes:
        options: one for each strategy: "sequences", "layers", "store".
        chosen: the one that `fkernel.kernel` takes with the same arguments; None where none is feasible.
        budget: the memory budget in bytes, or None.
        workload: the counted work.
        rates: this machine's speed.
    """

    options: tuple[Option, ...]
    chosen: Option | None
    budget: int | None
    workload: Workload
    rates: Rates

    @property
    def reason(self) -> str:
        """Why the chosen strategy is chosen, or what would be needed."""
        if self.chosen is None:
            return str(_too_small(self.options, self.budget, self.workload))
        if self.budget is None:
            return "no memory grant was given: the smaller side's gradients are held whole"
        slower = sorted(
            o.seconds / self.chosen.seconds for o in self.options if not o.infeasible_reason and o is not self.chosen
        )
        return f"fastest feasible; the next takes {slower[0]:.2f} times as long" if slower else "the only feasible one"


@public
def estimate(
    f: Function,
    params: Tree,
    E: Any,
    U: Any,
    precond: Preconditioner,
    *,
    memory: int | str | None = None,
    microbatch: int | None = None,
    store: Path | str | None = None,
) -> Estimate:
    """Predict memory, disk and time of `fkernel.kernel` with the same arguments, without computing a gradient.

    Work is counted by running f on tensors without storage; this machine's rates are measured once, in a few seconds,
    and kept in ``$FKERNEL_CACHE``.

    Args:
        f: (params, batch) -> [n].
        params: θ.
        E: the evaluation batch.
        U: the update batch.
        precond: P; a `precond.Diagonal` is applied in the contraction, any other callable needs dense rows of U.
        memory: as in `fkernel.kernel`.
        microbatch: as in `fkernel.kernel`.
        store: as in `fkernel.kernel`.

    Raises:
        BatchError, TreeError, ModelError: as `fkernel.kernel`. A budget that is too small is not an error here.

    Example:
        >>> import torch
        >>> from fkernel import precond
        >>> f = lambda params, x: torch.nn.functional.linear(x, params["w"]).square().sum((1, 2))
        >>> params, x = {"w": torch.ones(8, 8)}, torch.ones(4, 2, 8)
        >>> costs = estimate(f, params, x, x, precond.identity(), memory="1MB")
        >>> [option.name for option in costs.options]
        ['sequences', 'layers', 'store']
    """
    check_sides(f, params, E, U, layers=True)
    microbatch = usual_microbatch(microbatch, E, U)
    return estimated(f, params, E, U, memory, microbatch, not isinstance(precond, Diagonal), store is not None)


def estimated(
    f: Function,
    params: Tree,
    E: Any,
    U: Any,
    memory: int | str | None,
    microbatch: int,
    dense_U: bool,
    store: bool,
) -> Estimate:
    """Estimate, for callers that have checked their arguments."""
    budget = None if memory is None else parse_bytes(memory)
    with translate_errors(params):
        load = workload(f, params, E, U, dense_U)
    return weighed(load, rates(computed_like(params).dtype), budget, microbatch, store)


def weighed(load: Workload, speed: Rates, budget: int | None, microbatch: int, store: bool) -> Estimate:
    """Estimate from a workload."""
    tried = options(load, speed, budget, microbatch, store)
    if budget is None:
        n_E, n_U = (len(load.tokens[side]) for side in ("E", "U"))
        whole = load.curve is not None
        usual = default(n_E, n_U, load.longest, microbatch, load.dense_U) if whole else _by_layers(n_E, n_U)
        return Estimate(tried, cost(load, speed, usual), budget, load, speed)
    feasible = [option for option in tried if not option.infeasible_reason]
    chosen = min(feasible, key=lambda option: option.seconds) if feasible else None
    return Estimate(tried, chosen, budget, load, speed)


def choose(
    f: Function,
    params: Tree,
    E: Any,
    U: Any,
    memory: int | str | None,
    microbatch: int,
    dense_U: bool,
    store: bool,
    reserved: int = 0,
    needed: Callable[[], int] = lambda: 0,
    ranks: int | None = None,
) -> Strategy:
    """Choose how to compute a kernel within a memory budget less `reserved` bytes; with ranks, of each of them.

    Raises:
        BatchError: the budget is too small for every strategy, or below `needed()`, the bytes needed before or after;
            the message says how much would suffice.
    """
    if isinstance(params, ShardedTree):
        return _in_shards(f, params, E, U, memory, reserved // params.group.size)
    if memory is None:
        T = max(1 if counts is None else int(counts.max()) for counts in (lengths(E), lengths(U)))
        if (T > LONG or is_half(params)) and not dense_U:
            cut = cut_of(f, params, U)
            if not isinstance(cut, str):
                return _by_layers(length(E), length(U))
            if is_half(params):
                raise ModelError(f"{HALVES}, and f cannot be: {cut}. Convert them: fkernel.tree.cast.")
        return default(length(E), length(U), T, microbatch, dense_U)
    budget = parse_bytes(memory)
    if ranks is not None:
        with translate_errors(params):
            load = workload(f, params, E, U, dense_U)
        if load.curve is not None:
            return choose_over_ranks(load, params, budget, microbatch, ranks, reserved, needed())
    predicted = estimated(f, params, E, U, max(0, budget - reserved), microbatch, dense_U, store)
    chosen = predicted.chosen
    if chosen is not None and chosen.name != "layers" and budget < needed():
        layers = [option for option in predicted.options if option.name == "layers" and not option.infeasible_reason]
        chosen = layers[0] if layers else None
    if chosen is None:
        raise _too_small(
            predicted.options, budget, predicted.workload, reserved, 0 if predicted.workload.curve is None else needed()
        )
    return chosen.strategy


def _in_shards(f: Function, params: ShardedTree, E: Any, U: Any, memory: int | str | None, reserved: int) -> Strategy:
    """Choose for θ in shards, which is computed layer by layer."""
    cut = cut_of(f, params, U)
    if isinstance(cut, str):
        raise ModelError(f"{SHARDS}, and cannot be: {cut}. {GATHER}")
    if memory is None:
        return _by_layers(length(E), length(U))
    tokens = {side: sorted(token_counts(batch), reverse=True) for side, batch in (("E", E), ("U", U))}
    with translate_errors(params):
        walk = walk_of(cut, params, tokens)
    itemsize = computed_like(params).element_size()
    return choose_in_shards(walk, tokens, itemsize, params.group.size, parse_bytes(memory), reserved)


def _by_layers(n_E: int, n_U: int) -> Strategy:
    """Return the default for long sequences: a layer's gradients of the smaller batch are held."""
    return Strategy("layers", "E" if n_E <= n_U else "U", None, None, 0)


def _too_small(
    tried: tuple[Option, ...], budget: int | None, load: Workload, reserved: int = 0, needed: int = 0
) -> BatchError:
    least = max(needed, min(option.needs for option in tried if option.memory) + reserved)
    beside = f"{reserved} bytes of vectors, " if reserved else ""
    return BatchError(
        f"memory={budget} bytes is too small for every strategy: for {load.size} parameters and sequences of "
        f"{load.longest} tokens the smallest, one sequence of each side at a time, needs {beside}its activations, its "
        f"gradients and the kernel itself. Give at least {least} bytes, or shorten the sequences."
    )


class Walking(NamedTuple):
    """How a batch walks layer by layer.

    Attributes:
        tokens: of a block of sequences that are processed together; 0: one sequence at a time.
        every: one in so many layer inputs is kept.
        together: tokens of each rank's sequences that walk together where θ is in shards: it is gathered twice for
            each such group. None: all.
    """

    tokens: int = 0
    every: int = 1
    together: int | None = LONG


def walking_of(f: Function, params: Tree, batches: tuple[Any, ...], memory: int | str | None) -> Walking | None:
    """Plan layer-by-layer walks over batches, one at a time, within a memory budget; None where no sequence is long.

    Raises:
        BatchError: the budget is too small; the message says how much would suffice.
    """
    for batch in batches:
        check_batch(batch)
    counts = [sorted(token_counts(batch), reverse=True) for batch in batches]
    in_shards = isinstance(params, ShardedTree)
    if max(each[0] for each in counts) <= LONG and not is_half(params) and not in_shards:
        return None
    cut = cut_of(f, params, batches[0])
    if isinstance(cut, str):
        if in_shards:
            raise ModelError(f"{SHARDS}, and cannot be: {cut}. {GATHER}")
        return None
    if memory is None:
        return Walking()
    budget, itemsize = parse_bytes(memory), computed_like(params).element_size()
    largest = max(counts, key=sum)
    walk, needed = walk_of(cut, params, {"E": largest[:1], "U": largest}), 0
    vectors = 3 * bytes_of(params)
    for every in EVERY:
        needed = ceil((vectors + walk.memory({"E": largest[:1], "U": largest}, itemsize, every, 0)) / USABLE)
        if needed <= budget:
            return Walking(every=every)
    raise BatchError(f"memory={memory!r} cannot hold three vectors and a walk by layers; give at least {needed} bytes.")
