"""Gradients of long sequences, recomputed layer by layer for every use instead of kept.

Factors of a long sequence's gradient are no smaller than the dense gradient: 64 of them at half a billion parameters
take 126 GB. A walk costs 1.25 plain forward and backward passes, and holds one layer's gradients at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch

from fkernel import func
from fkernel.boundary import public
from fkernel.distributed import ShardedTree
from fkernel.engine.batching import SortedBatch
from fkernel.engine.gradients import Gradients, computed
from fkernel.engine.layerwise import along_of, gradient_sum, must_cut
from fkernel.engine.planning import Strategy, Workload, rates
from fkernel.engine.planning.estimates import Walking, choose, walking_of
from fkernel.engine.planning.kept import choose_meeting
from fkernel.engine.planning.walking import walk_of
from fkernel.engine.problem import Problem, blocks
from fkernel.engine.sums_in_shards import gradient_in_shards
from fkernel.func.handles import ProductSpec, RowSpec
from fkernel.func.inputs import Function, computed_like, plain, take, trim
from fkernel.shapes import Tensor, Tree
from fkernel.tree import size

ALONE = Strategy("layers", "E", 1, None, 0)
"""Products of rows alone: one sequence at a time."""
WHOLE = ALONE._replace(tile=None)
"""The default: both batches at once."""


class WalkedGradients(Gradients):
    """J of one batch at θ, recomputed at every read; a microbatch is one sequence, written out whole.

    Where θ is in shards, all ranks call the same methods in the same order, vectors are this rank's shards, and no
    single gradient is read.

    Attributes:
        params: θ.
        how: block size and checkpointing of a walk over one sequence.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> shape = {"vocab_size": 11, "n_positions": 8, "n_embd": 4, "n_layer": 2, "n_head": 1}
        >>> apply, params = func.make_functional(GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)))
        >>> S, batch = func.sequence_logprob(apply), func.pad([[1, 2], [3]], [[4], [5]])
        >>> J = WalkedGradients(SortedBatch("U", batch, S), params, Walking())
        >>> sorted(J.weighted_sum(torch.ones(2))) == sorted(params)
        True
    """

    walked = True

    def __init__(self, side: SortedBatch, params: Tree, how: Walking, count: int = 0) -> None:
        """Take a batch with its f, θ, how to walk it, and the number of sequences computed so far."""
        each = [slice(i, i + 1) for i in range(len(side))]
        super().__init__(side, each, computed(side, ((1.0, params),), each).read, count)
        self.params, self.how, self.whole = params, how, not isinstance(params, ShardedTree)

    def weighted_sum(self, weights: Tensor, on_progress: Callable[[int], Any] = lambda n: None) -> Tree:
        """Compute Jᵀ w, [n] -> {name: [*shape]}; `on_progress` is told the number of sequences after some of them."""
        return self._summed(func.weighted_sum, weights, on_progress)

    def _summed(
        self,
        of: Callable[[Any, Tensor], Tree],
        weights: Tensor,
        on_progress: Callable[[int], Any] = lambda n: None,
    ) -> Tree:
        if isinstance(self.params, ShardedTree):
            return gradient_in_shards(self.side, self.params, weights, self.how, of, on_progress)
        return gradient_sum(self.side, self.params, weights, self.how, of, on_progress)

    def along(self, vector: Tree) -> Tensor:
        """Compute ⟨g, v⟩ of every sequence, [n] float64."""
        if isinstance(self.params, ShardedTree):
            return self._rows(ProductSpec(x=RowSpec({"along": vector})), "along")[0]
        return along_of(self.side, ((1.0, plain(self.params)),), self.params, vector, self.how)

    def squared_norms(self, D: Tree | None) -> func.SquaredNorms:
        """Compute ‖g‖² and ⟨g, D g⟩ of every sequence, [n] float64."""
        spec = ProductSpec(x=RowSpec(squares={"plain": None, "weighted": D}))
        return func.SquaredNorms(*self._rows(spec, "plain", "weighted"))

    def _rows(self, spec: ProductSpec, *names: str) -> Tensor:
        """Compute products of each sequence's gradient, [names n] float64."""
        values = torch.empty(len(names), len(self), dtype=torch.float64, device="cpu")
        for block in blocks(problem_of(self.params, self.side, None, spec), choose_alone(self.params, self.how)):
            values[:, block.at] = torch.stack([block.rows(name) for name in names])
        return values

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the gradients."""
        return computed_like(self.params).dtype

    def with_itself(self, D: Tree | None, how: Strategy | None = None) -> tuple[Tensor, Tensor]:
        """Compute K of the batch with itself and ‖g‖²: ([n n] symmetric to the last bit, [n]), float64."""
        n = len(self)
        K, norms = (torch.empty(*shape, dtype=torch.float64, device="cpu") for shape in ((n, n), (n,)))
        spec = ProductSpec({"": D}, RowSpec(squares={"norm": None}))
        for block in blocks(problem_of(self.params, self.side, self.side, spec), how or WHOLE):
            K[block.at], norms[block.at] = block.kernel(), block.rows("norm")
        return (K + K.T) / 2, norms


@public
def problem_of(params: Tree, E: SortedBatch, U: SortedBatch | None, spec: ProductSpec, **more: Any) -> Problem:
    """Return the products of two batches: of all ranks together, with vectors in shards, where θ is in shards.

    Args:
        params: θ.
        E: the rows.
        U: the columns; None for products of rows alone.
        spec: the products.
        **more: as in `Problem`.

    Example:
        >>> side = SortedBatch("U", torch.eye(2), lambda params, x: x @ params["w"])
        >>> problem_of({"w": torch.ones(2)}, side, side, ProductSpec({"": None})).sharded
        False
    """
    group = params.group if isinstance(params, ShardedTree) else None
    return Problem(params, E, U, spec, group=group, sharded=group is not None, **more)


@public
def choose_alone(params: Tree, how: Walking) -> Strategy:
    """Choose how one batch walks by itself: a sequence at a time; all, where θ is gathered for each of them.

    Example:
        >>> choose_alone({"w": torch.ones(2)}, Walking()).tile
        1
    """
    return (WHOLE if isinstance(params, ShardedTree) else ALONE)._replace(every=how.every)


@public
def choose_walk(
    E: SortedBatch, U: SortedBatch, params: Tree, memory: int | None, microbatch: int, reserved: int = 0
) -> Strategy:
    """Plan a layer-by-layer contraction of two batches within a memory budget less `reserved` bytes.

    Raises:
        BatchError: none fits; the message says how much would suffice.

    Example:
        >>> one, two = SortedBatch("E", torch.ones(1, 2)), SortedBatch("U", torch.ones(2, 2))
        >>> choose_walk(one, two, {"w": torch.ones(2)}, None, 8)[:2]
        ('layers', 'E')
    """
    if isinstance(params, ShardedTree):
        assert U.f is not None
        return choose(U.f, params, E.batch, U.batch, memory, microbatch, False, False, reserved)
    if memory is None:  # a layer's gradients of the smaller side are held, as `fkernel.kernel` does
        return Strategy("layers", "E" if len(E) <= len(U) else "U", None, None, 0)
    load = walk_load(E, U, params)
    return choose_meeting(load, memory, rates(computed_like(params).dtype), microbatch, reserved).strategy


@public
def walk_load(E: SortedBatch, U: SortedBatch, params: Tree) -> Workload:
    """Count the work of a layer-by-layer contraction of two batches; U with its f.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> shape = {"vocab_size": 11, "n_positions": 8, "n_embd": 4, "n_layer": 2, "n_head": 1}
        >>> apply, params = func.make_functional(GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)))
        >>> S, batch = func.sequence_logprob(apply), func.pad([[1, 2], [3]], [[4], [5]])
        >>> walk_load(SortedBatch("E", batch), SortedBatch("U", batch, S), params).tokens
        {'E': [3, 2], 'U': [3, 2]}
    """
    assert U.f is not None
    tokens = {"E": E.tokens, "U": U.tokens}
    walk = walk_of(must_cut(U.f, params, U.batch), params, tokens)
    return Workload(tokens, size(params), computed_like(params).element_size(), 0.0, None, walk=walk)


@public
def walking_alone(f: Function, params: Tree, side: SortedBatch, memory: int | str | None) -> Walking | None:
    """Plan a walk over a batch's longest sequence within a memory budget; None where no sequence is long.

    Raises:
        BatchError: the budget is too small for one sequence; the message says how much would suffice.

    Example:
        >>> f, side = lambda params, x: x @ params["w"], SortedBatch("U", torch.ones(3, 2))
        >>> walking_alone(f, {"w": torch.ones(2)}, side, None) is None
        True
    """
    return walking_of(f, params, (trim(take(side.batch, slice(0, 1))),), memory)
