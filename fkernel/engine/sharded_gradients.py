"""Gradients of one batch that several ranks hold together: all sequences, each rank its shards of the parameters.

Sums over sequences are gathered, products are summed over ranks, so that every rank has the same result. All ranks must
call the same methods in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch

from fkernel import func
from fkernel.distributed import Group
from fkernel.engine.batching import SortedBatch
from fkernel.engine.gradients import Gradients
from fkernel.engine.over_ranks import held_shards, over_all, own_shard, ranked, whole_tree
from fkernel.engine.streaming import self_kernel
from fkernel.func.handles import Handles
from fkernel.shapes import Tensor, Tree


class ShardedGradients(Gradients):
    """J of one batch at θ, in memory: this rank's shards of all rows; a read has these alone.

    Attributes:
        group: the ranks.
        params: θ.
    """

    whole = False

    def __init__(
        self, side: SortedBatch, params: Tree, tokens: int | None, group: Group, promised: bool = False
    ) -> None:
        """Compute and hold them: every rank its share of the sequences, in microbatches of at most so many tokens."""
        self.group, self.params = group, params
        held = held_shards(ranked(side, ((1.0, params),), tokens, group, params, promised), None, group, params)
        held.read(0)
        super().__init__(side, held.cuts, held.read, len(side), shares=held.shares)

    def _summed(self, of: Callable[[Handles, Tensor], Tree], weights: Tensor) -> Tree:
        return whole_tree(super()._summed(of, weights), self.group, self.params)

    def along(self, vector: Tree) -> Tensor:
        """Compute ⟨g, v⟩ of every sequence, [n] float64."""
        return over_all(super().along(own_shard(vector, self.group)), self.group)

    def squared_norms(self, D: Tree | None) -> func.SquaredNorms:
        """Compute ‖g‖² and ⟨g, D g⟩ of every sequence, [n] float64."""
        own = super().squared_norms(None if D is None else own_shard(D, self.group))
        return func.SquaredNorms(*over_all(torch.stack([*own]), self.group))

    def with_itself(self, D: Tree | None) -> tuple[Tensor, Tensor]:
        """Compute K of the batch with itself and ‖g‖²: ([n n] symmetric to the last bit, [n]), float64."""
        K, norms = self_kernel(self, None if D is None else own_shard(D, self.group))
        return over_all(K, self.group), over_all(norms, self.group)

    def one(self, row: int) -> Handles:
        """Gather the gradient of one sequence, n = 1, by its row in the caller's batch."""
        own: Any = super().one(row)
        whole = whole_tree({name: leaf[0] for name, leaf in own.items()}, self.group, self.params)
        return {name: leaf[None] for name, leaf in whole.items()}

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the gradients, on every rank."""
        return next(iter(self.read(0).values())).dtype  # pyright: ignore[reportAttributeAccessIssue]
