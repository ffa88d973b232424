"""U's per-sequence gradients, a microbatch at a time: held in memory, or kept in a store; and one sequence's, by id."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch

from fkernel import func, precond, tree
from fkernel.engine.sides import Ordered
from fkernel.func.handles import Handles, at, each_tensor, form, nbytes, shape_of, stack_handles, tensors
from fkernel.shapes import Tensor, Tree

Read = Callable[[int], Handles]
"""i ↦ the gradients of microbatch i."""


class Gradients:
    """J_U in microbatches, longest sequences first.

    Attributes:
        side: U as it is ordered.
        cuts: the rows of each microbatch, in that order.
        read: i ↦ its handles.
        computed: how many sequences' gradients this process computed; the others were read.
    """

    def __init__(
        self, side: Ordered, cuts: Sequence[slice], read: Read, computed: int, device: torch.device | None = None
    ) -> None:
        """Take what is held or stored; what is stored is served on a device, where one is given."""
        self.side, self.cuts, self.computed = side, list(cuts), computed
        self.read = read if device is None else lambda i: _on(device, read(i))

    def __len__(self) -> int:
        """Count the sequences."""
        return len(self.side)

    def __iter__(self) -> Iterator[tuple[Tensor, Handles]]:
        """Walk the microbatches: (their rows in the caller's batch, their handles)."""
        for i, rows in enumerate(self.cuts):
            yield self.side.order[rows], self.read(i)

    def blocks(self) -> Iterator[tuple[Tensor, Callable[[], Handles]]]:
        """Walk the microbatches: (their rows in the caller's batch, what reads their handles)."""
        for i, rows in enumerate(self.cuts):
            yield self.side.order[rows], lambda i=i: self.read(i)

    def weighted_sum(self, weights: Tensor) -> Tree:
        """Compute J_Uᵀ w, [n_U] -> {name: [*shape]}; no gradient is computed."""
        total: Tree = {}
        for rows, handles in self:
            leaf = tensors(next(iter(handles.values())))[-1]
            part = func.weighted_sum(handles, weights[rows].to(leaf.device))
            total = {name: total[name].add_(leaf) for name, leaf in part.items()} if total else part
        return total

    def rows_against(self, others: Handles, P: precond.Diagonal) -> Tensor:
        """Compute ⟨g_e, P g_u⟩ for some gradients g_e and all of U, [n_e n_U]."""
        parts = [func.contract(others, handles, diagonal=P.d) for _, handles in self]
        return torch.cat(parts, 1).cpu()[:, self.side.order.argsort()]

    def parts_against(self, others: Handles, P: precond.Diagonal, key: Callable[[str], str]) -> dict[str, Tensor]:
        """Compute ⟨g_e, P g_u⟩ by groups of parameters, {group: [n_e n_u]}; they add up to `rows_against`."""
        found: dict[str, list[Tensor]] = {}
        for _, handles in self:
            for group, part in func.contract_by(others, handles, key, diagonal=P.d).items():
                found.setdefault(group, []).append(part.cpu())
        places = self.side.order.argsort()
        return {group: torch.cat(parts, 1)[:, places] for group, parts in found.items()}

    def squared_sum(self) -> Tree:
        """Compute Σ_u g_u², {name: [*shape]}; no gradient is computed."""
        total: Tree = {}
        for _, handles in self:
            part = func.squared_sum(handles)
            total = {name: total[name].add_(leaf) for name, leaf in part.items()} if total else part
        return total

    def self_kernel(self, P: precond.Diagonal, room: int | None = None) -> Tensor:
        """Compute K_UU, [n_U n_U], symmetric to the last bit; each pair of microbatches is contracted once.

        Args:
            P: the preconditioner.
            room: bytes of gradients that are held on one side at a time; None for all.
        """
        K: Tensor | None = None
        for block, held in within(room, self.read, len(self.cuts)):
            J = stack_handles(held)
            rows = torch.cat([self.side.order[self.cuts[i]] for i in block])
            for i in range(block[0], len(self.cuts)):
                columns = self.side.order[self.cuts[i]]
                part = func.contract(J, self.read(i), diagonal=P.d).cpu()
                K = part.new_zeros(len(self), len(self)) if K is None else K
                K[rows[:, None], columns] = part
                K[columns[:, None], rows] = part.T
        assert K is not None
        return (K + K.T) / 2  # a block against itself is a product of two matrices, symmetric up to rounding

    def squared_norms(self, P: precond.Diagonal) -> func.SquaredNorms:
        """Compute ‖g‖² and ⟨g, P g⟩ of every sequence, [n_U] each."""
        found = torch.empty(2, len(self), dtype=torch.float64)
        for rows, handles in self:
            found[:, rows] = torch.stack([*func.squared_norms(handles, diagonal=P.d)]).cpu()
        return func.SquaredNorms(*found)

    def one(self, row: int) -> Handles:
        """Read the handles of one sequence, n = 1, by its row in the caller's batch."""
        place = int((self.side.order == row).nonzero())
        i = next(i for i, rows in enumerate(self.cuts) if rows.start <= place < rows.stop)
        at_ = slice(place - self.cuts[i].start, place - self.cuts[i].start + 1)
        return {name: at(handle, at_) for name, handle in self.read(i).items()}  # pyright: ignore[reportArgumentType]

    @cached_property
    def largest(self) -> int:
        """Bytes of a microbatch of the longest sequences."""
        return nbytes(self.read(0))


def within(room: int | None, read: Read, n: int) -> Iterator[tuple[list[int], list[Handles]]]:
    """Walk n microbatches, as many at a time as have room: (which they are, their gradients).

    Args:
        room: bytes; None for all at once. A microbatch that is larger goes alone.
        read: i ↦ the gradients of microbatch i.
        n: how many there are.
    """
    block, held, size = list[int](), list[Handles](), 0
    for i in range(n):
        handles = read(i)
        if block and room is not None and size + nbytes(handles) > room:
            yield block, held
            block, held, size = [], [], 0
        block.append(i)
        held.append(handles)
        size += nbytes(handles)
    yield block, held


def _on(device: torch.device, handles: Handles) -> Handles:
    return {name: each_tensor(lambda leaf: leaf.to(device), handle) for name, handle in handles.items()}


class GradientCache:
    """One sequence's gradient; every view of it is made when it is first asked for.

    Attributes:
        sequence_id: whose it is.
    """

    def __init__(self, sequence_id: str, read: Callable[[], Handles], P: precond.Diagonal) -> None:
        """Take where it is read from, and P."""
        self.sequence_id, self._read, self._P = sequence_id, read, P

    @cached_property
    def handles(self) -> Handles:
        """The gradient in whatever form is smallest, n = 1."""
        return self._read()

    @cached_property
    def raw(self) -> Tree:
        """∇S, {name: [*shape]}."""
        found: Tree = {}
        for name, handle in self.handles.items():
            leaf = tensors(handle)[-1].new_empty(1, *shape_of(handle))
            form(handle, leaf)
            found[name] = leaf[0]
        return found

    @cached_property
    def preconditioned(self) -> Tree:
        """P ∇S, {name: [*shape]}."""
        return self._P(self.raw)

    @cached_property
    def norm(self) -> float:
        """‖∇S‖."""
        return float(tree.norm(self.raw))

    @cached_property
    def preconditioned_norm(self) -> float:
        """√⟨∇S, P ∇S⟩, the norm that P measures with."""
        return float(func.squared_norms(self.handles, diagonal=self._P.d).weighted) ** 0.5

    def release(self) -> None:
        """Forget what was made; it is made again when it is asked for."""
        for name in ("handles", "raw", "preconditioned"):
            self.__dict__.pop(name, None)
