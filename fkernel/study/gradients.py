"""One sequence's gradient, by id: raw, preconditioned, and its norms."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from fkernel import func, precond, tree
from fkernel.func.handles import Handles, materialize_into, shape_of, tensors
from fkernel.shapes import Tree


class GradientCache:
    """One sequence's gradient, read on first use.

    Attributes:
        sequence_id: the sequence's id.
    """

    def __init__(self, sequence_id: str, read: Callable[[], Handles], P: precond.Diagonal) -> None:
        """Nothing is read yet."""
        self.sequence_id, self._read, self._P = sequence_id, read, P

    @cached_property
    def handles(self) -> Handles:
        """The gradient in its factored form, n = 1."""
        return self._read()

    @cached_property
    def raw(self) -> Tree:
        """∇S, {name: [*shape]}."""
        gradient: Tree = {}
        for name, handle in self.handles.items():
            leaf = tensors(handle)[-1].new_empty(1, *shape_of(handle))
            materialize_into(handle, leaf)
            gradient[name] = leaf[0]
        return gradient

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
        """√⟨∇S, P ∇S⟩, the norm in the metric P."""
        return float(func.squared_norms(self.handles, diagonal=self._P.d).weighted) ** 0.5

    def release(self) -> None:
        """Free the tensors; the next use reads them again."""
        for name in ("handles", "raw", "preconditioned"):
            self.__dict__.pop(name, None)
