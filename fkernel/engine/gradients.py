"""Per-sequence gradients of one batch, a microbatch at a time: computed on demand, held in memory, or on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import cached_property
from typing import Any

import torch

from fkernel import func
from fkernel.boundary import public
from fkernel.engine.batching import SortedBatch, blocks, error_context
from fkernel.engine.path import Nodes, mean_of
from fkernel.engine.planning.workloads import LONG
from fkernel.func.handles import (
    Handles,
    at,
    each_tensor,
    materialize_into,
    nbytes,
    packed,
    stack_handles,
    tensors,
    widest,
)
from fkernel.func.inputs import length, plain, take, translate_errors, trim
from fkernel.func.layers import Walk, cut_of
from fkernel.func.taps import handle_pieces
from fkernel.func.trust import plan_of
from fkernel.shapes import Tensor, Tree

Read = Callable[..., Handles]
"""(i) ↦ the gradients of microbatch i; gradients on disk also take names, and read only those."""


class Gradients:
    """J of one batch in microbatches, longest sequences first.

    Attributes:
        side: the sorted batch.
        cuts: the rows of each microbatch, in sorted order.
        read: i ↦ its handles.
        computed: number of sequences whose gradients this process computed; the others were read.
        shares: groups of parameters that can be read separately; None where a microbatch is read whole.
        walked: whether gradients are recomputed at every read instead of kept.
        whole: whether a read has whole gradients, and not a rank's shards of them.
    """

    walked, whole = False, True

    def __init__(
        self,
        side: SortedBatch,
        cuts: Sequence[slice],
        read: Read,
        computed: int = 0,
        device: torch.device | None = None,
        shares: Sequence[Sequence[str]] | None = None,
    ) -> None:
        """Take the function that reads gradients; with a device, they are moved there."""
        self.side, self.cuts, self.computed, self.shares = side, list(cuts), computed, shares
        self.read: Read = read if device is None else lambda i, *names: _on(device, read(i, *names))

    def __len__(self) -> int:
        """Count the sequences."""
        return len(self.side)

    def __iter__(self) -> Iterator[tuple[Tensor, Handles]]:
        """Walk the microbatches: (their rows in the caller's batch, their handles)."""
        for i, rows in enumerate(self.cuts):
            yield self.side.order[rows], self.read(i)

    def each(self) -> Iterator[tuple[Tensor, Callable[[], Handles]]]:
        """Walk the microbatches: (their rows in the caller's batch, what reads their handles)."""
        for i, rows in enumerate(self.cuts):
            yield self.side.order[rows], lambda i=i: self.read(i)

    def blocks(self, tokens: int | None) -> Iterator[list[int]]:
        """Group successive microbatches into blocks of at most `tokens`."""
        return blocks(self.side, self.cuts, tokens)

    def rows(self, block: Sequence[int]) -> slice:
        """Return the rows of a block, in sorted order."""
        return slice(self.cuts[block[0]].start, self.cuts[block[-1]].stop)

    def gathered(self, block: Sequence[int], names: Sequence[str] | None = None) -> Handles:
        """Read and stack the gradients of some microbatches, of all parameters or of some."""
        return stack_handles(self.read(i) if names is None else self.read(i, names) for i in block)

    def in_memory(self, on_progress: Callable[[int], Any] = lambda n: None, *, together: bool = True) -> Gradients:
        """Compute or read everything once and hold it, copied together to avoid fragmentation."""
        held = []
        for i, rows in enumerate(self.cuts):
            handles = self.read(i)
            held.append(packed(handles) if together else handles)
            on_progress(rows.stop - rows.start)
        return Gradients(self.side, self.cuts, held.__getitem__, len(self))

    def remembering(self, held: dict[int, Handles], room: int) -> Gradients:
        """Cache microbatches in `held` as they are read, up to `room` bytes in all."""
        size = sum(map(nbytes, held.values()))

        def read(i: int, *names: Sequence[str]) -> Handles:
            nonlocal size
            if i in held:
                return {name: held[i][name] for name in names[0]} if names else held[i]
            handles = self.read(i, *names)
            if not names and (own := nbytes(handles)) + size <= room:
                held[i], size = handles, size + own
            return handles

        return Gradients(self.side, self.cuts, read, self.computed, shares=self.shares)

    def weighted_sum(self, weights: Tensor) -> Tree:
        """Compute Jᵀ w, [n] -> {name: [*shape]}."""
        return self._summed(func.weighted_sum, weights)

    def squared_sum(self, weights: Tensor | None = None) -> Tree:
        """Compute Σ_n w_n g_n², [n] -> {name: [*shape]}; w = 1 by default."""
        return self._summed(func.squared_sum, torch.ones(len(self)) if weights is None else weights)

    def along(self, vector: Tree) -> Tensor:
        """Compute ⟨g, v⟩ of every sequence, [n]."""
        one, products = (
            {name: leaf[None] for name, leaf in vector.items()},
            torch.empty(len(self), dtype=torch.float64, device="cpu"),
        )
        for rows, handles in self:
            products[rows.cpu()] = func.contract(handles, one)[:, 0].to(products)
        return products

    def squared_norms(self, D: Tree | None) -> func.SquaredNorms:
        """Compute ‖g‖² and ⟨g, D g⟩ of every sequence, [n] float64; D = 1 where None."""
        plain, weighted = torch.empty(2, len(self), dtype=torch.float64, device="cpu")
        for rows, handles in self:
            norms = func.squared_norms(handles, diagonal=D)
            at = rows.cpu()
            plain[at], weighted[at] = norms.plain.cpu(), norms.weighted.cpu()
        return func.SquaredNorms(plain, weighted)

    def _summed(self, of: Callable[[Handles, Tensor], Tree], weights: Tensor) -> Tree:
        """Σ_n w_n of gradients, or of their squares; a microbatch whose weights are all 0 is not read."""
        total: Tree = {}
        for i, rows in enumerate(self.cuts):
            w = weights[self.side.order[rows].to(weights.device)]
            if total and not bool(w.any()):
                continue
            handles = self.read(i)
            part = of(handles, w.to(tensors(next(iter(handles.values())))[-1].device))
            total = {name: total[name].add_(leaf) for name, leaf in part.items()} if total else part
        return total

    def one(self, row: int) -> Handles:
        """Read the handles of one sequence, n = 1, by its row in the caller's batch."""
        place = int((self.side.order == row).nonzero())
        i = next(i for i, rows in enumerate(self.cuts) if rows.start <= place < rows.stop)
        here = slice(place - self.cuts[i].start, place - self.cuts[i].start + 1)
        return {name: at(handle, here) for name, handle in self.read(i).items()}  # pyright: ignore[reportArgumentType]

    def chosen(self, rows: Tensor) -> Gradients:
        """Select sequences by their rows in the caller's batch; row i of the result is rows[i]."""
        cuts, places, order = list[slice](), list[tuple[int, Tensor]](), list[Tensor]()
        for i, here in enumerate(self.cuts):
            matches = (rows[:, None] == self.side.order[here]).nonzero()  # (place among the rows, in the microbatch)
            if len(matches):
                start = cuts[-1].stop if cuts else 0
                cuts.append(slice(start, start + len(matches)))
                places.append((i, matches[:, 1]))
                order.append(matches[:, 0])
        side = copy(self.side)
        side.order = torch.cat(order)
        side.tokens = [self.side.tokens[self.cuts[i].start + k] for i, place in places for k in place.tolist()]

        def read(k: int) -> Handles:
            i, place = places[k]
            return {name: at(handle, place) for name, handle in self.read(i).items()}  # pyright: ignore[reportArgumentType]

        return Gradients(side, cuts, read)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the gradients, at least float32."""
        handles = self.read(0)
        return widest(handles, handles)

    @cached_property
    def largest(self) -> int:
        """Bytes of a microbatch of the longest sequences."""
        return nbytes(self.read(0))

    @property
    def token_bytes(self) -> float:
        """Bytes of gradients per token, estimated from the first microbatch."""
        rows = self.cuts[0]
        return self.largest / ((rows.stop - rows.start) * self.side.tokens[rows.start])


@public
def computed(side: SortedBatch, nodes: Nodes, cuts: Sequence[slice], promised: bool = False) -> Gradients:
    """Compute gradients on demand: ḡ = Σ_j q_j ∇f(θ_j) over the nodes of a path.

    Args:
        side: the sorted batch, with its f.
        nodes: (q_j, θ_j); without a path, θ with weight 1.
        cuts: the microbatches.
        promised: whether a memory budget was given: gradients are then copied together, so that the temporaries of
            the passes leave no gaps between them.

    Example:
        >>> params, side = {"w": torch.ones(2)}, SortedBatch("U", torch.eye(2), lambda params, x: x @ params["w"])
        >>> computed(side, ((1.0, params),), [slice(0, 2)]).weighted_sum(torch.tensor([1.0, 3.0]))
        {'w': tensor([1., 3.])}
    """
    f, θ = side.f, nodes[0][1]
    assert f is not None
    with error_context(side.name), translate_errors(θ):
        cut = cut_of(f, θ, side.batch) if side.tokens[0] > LONG else "short"
        plan = plan_of(f, θ, side.batch) if isinstance(cut, str) else None

    def one(params: Tree, part: Any) -> Handles:
        if plan is None:
            return _by_layers(cut, params, part)
        (handles,) = handle_pieces(f, params, part, [slice(0, length(part))], plan)
        return handles

    def read(i: int) -> Handles:
        part, gradients = trim(take(side.batch, cuts[i])), list[tuple[float, Handles]]()
        for q, params in nodes:
            with error_context(side.name, side.order[cuts[i]]), translate_errors(params):
                gradients.append((q, one(params, part)))
        mean = mean_of(gradients)
        return packed(mean) if promised else mean

    return Gradients(side, cuts, read, len(side))


def _by_layers(cut: Any, params: Tree, part: Any) -> Handles:
    """Compute whole gradients of long sequences layer by layer, without logits; dense, since factors are larger."""
    walk = Walk(cut, plain(params), part)
    J = {name: leaf.new_empty(length(part), *leaf.shape) for name, leaf in params.items()}
    for rows, handles in walk.back():
        for name, handle in handles.items():
            materialize_into(handle, J[name][rows])
    return J


class Summing:
    """Gradients that accumulate Jᵀw as they are computed.

    Attributes:
        gradients: the same gradients; the first read of a microbatch adds it to Jᵀw.
        held: {i: microbatch i}, as many as fit in `room`.
    """

    def __init__(self, gradients: Gradients, weights: Tensor, room: int = 0) -> None:
        """Take gradients that are computed on read, w [n] in the caller's order, and bytes to hold them."""
        self.held, self._room = dict[int, Handles](), room
        self.gradients = Gradients(gradients.side, gradients.cuts, self._read)
        self._inner, self._weights, self._done = gradients, weights, set[int]()
        self._total: Tree = {}

    def _read(self, i: int) -> Handles:
        handles = self._inner.read(i)
        self._add(i, handles)
        if (own := nbytes(handles)) <= self._room:
            self.held[i], self._room = handles, self._room - own
        return handles

    def _add(self, i: int, handles: Handles) -> None:
        if i in self._done:
            return
        self._done.add(i)
        w = self._weights[self._inner.side.order[self._inner.cuts[i]].to(self._weights.device)]
        part = func.weighted_sum(handles, w)
        total = self._total
        self._total = {name: total[name].add_(leaf) for name, leaf in part.items()} if total else part

    def whole(self, kept: Gradients) -> Tree:
        """Return Jᵀw; where some were not computed here, all are read from `kept`, for bitwise equal results."""
        if len(self._done) < len(self._inner.cuts):
            return kept.weighted_sum(self._weights)
        return self._total


def _on(device: torch.device, handles: Handles) -> Handles:
    return {name: each_tensor(lambda leaf: leaf.to(device), handle) for name, handle in handles.items()}
