"""A preconditioner is a pure linear map on parameter space: tree → tree.

It is applied to a single vector `{name: [*shape]}` or to rows `{name: [n, *shape]}` alike, and nothing else is asked of
it: any callable is one. Preconditioners never look at the model or the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fkernel import tree
from fkernel.boundary import public
from fkernel.errors import TreeError, listing
from fkernel.precond.state import check_tree
from fkernel.shapes import Tensor, Tree

Preconditioner = Callable[[Tree], Tree]
"""Any linear callable tree → tree, on vectors {name: [*shape]} and on rows {name: [n, *shape]} alike."""


@dataclass(frozen=True, eq=False)
class Diagonal:
    """P = diag(d), which the engine can apply a shard at a time. Made by `diagonal`, `identity` and Adam's.

    Attributes:
        d: {name: [*shape]}, or None for ones.
    """

    d: Tree | None

    @public
    def __call__(self, x: Tree) -> Tree:
        """Return d ⊙ x, for {name: [*shape]} and for rows {name: [n, *shape]}."""
        check_tree(x, "The tree to precondition")
        if self.d is None:
            return dict(x)
        tree.check_names(x, self.d, "the tree to precondition", "the preconditioner")
        return {name: self.d[name] * _fits(leaf, self.d[name], name) for name, leaf in x.items()}


@public
def identity() -> Diagonal:
    """Make P = I: the plain Fisher kernel, or stochastic gradient descent's.

    Example:
        >>> import torch
        >>> identity()({"w": torch.ones(2)})
        {'w': tensor([1., 1.])}
    """
    return Diagonal(None)


@public
def diagonal(d: Tree) -> Diagonal:
    """Make P = diag(d).

    (P x)_α = d_α x_α

    Args:
        d: {name: [*shape]}, the shapes of the parameters.

    Returns:
        x ↦ d ⊙ x, for {name: [*shape]} and for rows {name: [n, *shape]}.

    Raises:
        TreeError: (when called) names differ, or a shape is neither the parameter's nor rows of it.
        NonFiniteError: d holds NaN or infinity.

    Example:
        >>> import torch
        >>> diagonal({"w": torch.tensor([1.0, 2.0])})({"w": torch.ones(3, 2)})["w"][0]
        tensor([1., 2.])
    """
    check_tree(d, "The diagonal")
    tree.check_finite(d, "the diagonal")
    return Diagonal(d)


@public
def select(names: Iterable[str]) -> Preconditioner:
    """Make the projection onto some parameters: the others become zero.

    Args:
        names: the parameters to keep.

    Raises:
        TreeError: no name is given, or (when called) the tree lacks one of them.

    Example:
        >>> import torch
        >>> select(["w"])({"w": torch.ones(2), "b": torch.ones(1)})
        {'w': tensor([1., 1.]), 'b': tensor([0.])}
    """
    kept = {names} if isinstance(names, str) else set(names)
    if not kept:
        raise TreeError("select was given no parameter name, so it would map everything to zero.")

    @public
    def apply(x: Tree) -> Tree:
        check_tree(x, "The tree to precondition")
        unknown = sorted(kept - set(x))
        if unknown:
            raise TreeError(f"select names {listing(unknown)}, which the tree lacks; it has {listing([*x])}.")
        return {name: leaf if name in kept else leaf.new_zeros(()).expand_as(leaf) for name, leaf in x.items()}

    return apply


@public
def chain(*parts: Preconditioner) -> Preconditioner:
    """Make the composition of preconditioners, applied from left to right.

    With two parts P and Q it maps x to Q(P(x)).

    Args:
        parts: the preconditioners, the first to be applied first.

    Example:
        >>> import torch
        >>> double = diagonal({"w": torch.tensor([2.0])})
        >>> chain(double, double)({"w": torch.ones(1)})
        {'w': tensor([4.])}
    """

    @public
    def apply(x: Tree) -> Tree:
        for part in parts:
            x = part(x)
        return x

    return apply


def _fits(leaf: Tensor, d: Tensor, name: str) -> Tensor:
    if leaf is None:
        raise TreeError(f"The tree has no tensor for {name!r}, only None; give zeros where there is no gradient.")
    if leaf.is_meta != d.is_meta:
        raise TreeError(f"The tree's {name!r}, or the preconditioner's, lies on the meta device and holds no values.")
    if leaf.shape != d.shape and leaf.shape[1:] != d.shape:
        raise TreeError(
            f"The tree's {name!r} has shape {list(leaf.shape)}; the preconditioner's has {list(d.shape)}, so it takes "
            f"that, or rows [n, {', '.join(str(s) for s in d.shape)}]."
        )
    return leaf
