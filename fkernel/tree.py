"""Algebra on parameter space: trees `{name: tensor}` as the vectors of one inner-product space.

Floor 0: everything above computes with these few operations. They are pure; nothing is changed in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import reduce
from typing import Any

import torch
from einops import rearrange

from fkernel.errors import NonFiniteError, TreeError, listing
from fkernel.shapes import Tensor, Tree

SHARD_COLUMNS = 1 << 16
"""Columns of one parameter shard: 64k fp32 columns of 64 rows are 16 MiB, about a last-level cache."""


def map(fn: Callable[..., Tensor], *trees: Tree) -> Tree:
    """Apply `fn` leaf by leaf to trees of the same names.

    Example:
        >>> map(torch.add, {"w": torch.ones(2)}, {"w": torch.ones(2)})
        {'w': tensor([2., 2.])}
    """
    first, *rest = trees
    for other in rest:
        check_names(other, first)
    return {name: fn(*(tree[name] for tree in trees)) for name in first}


def scale(a: float | Tensor, x: Tree) -> Tree:
    """Return a·x.

    Example:
        >>> scale(2.0, {"w": torch.ones(1)})
        {'w': tensor([2.])}
    """
    return {name: a * leaf for name, leaf in x.items()}


def axpy(a: float | Tensor, x: Tree, y: Tree) -> Tree:
    """Return a·x + y.

    Example:
        >>> axpy(2.0, {"w": torch.ones(2)}, {"w": torch.ones(2)})
        {'w': tensor([3., 3.])}
    """
    check_same(x, y, "x", "y")
    return {name: a * x[name] + y[name] for name in y}


def add(*trees: Tree) -> Tree:
    """Return the sum of trees of the same names and shapes.

    Example:
        >>> add({"w": torch.ones(1)}, {"w": torch.ones(1)}, {"w": torch.ones(1)})
        {'w': tensor([3.])}
    """
    for other in trees[1:]:
        check_same(other, trees[0], "an added tree", "the first")
    return map(lambda *leaves: reduce(torch.add, leaves), *trees)


def dot(x: Tree, y: Tree) -> Tensor:
    """Return ⟨x, y⟩ = Σ_α x_α y_α, a float64 scalar: one shard in its own dtype, the shards in float64.

    Example:
        >>> dot({"w": torch.ones(3)}, {"w": torch.full((3,), 2.0)})
        tensor(6., dtype=torch.float64)
    """
    check_same(x, y, "x", "y")
    total = torch.zeros((), dtype=torch.float64)
    for name in x:
        pairs = zip(x[name].reshape(-1).split(SHARD_COLUMNS), y[name].reshape(-1).split(SHARD_COLUMNS), strict=True)
        for left, right in pairs:
            total = total.to(left.device) + torch.dot(left, right).double()
    return total


def norm(x: Tree) -> Tensor:
    """Return ‖x‖₂ over all leaves, a float64 scalar.

    Example:
        >>> norm({"w": torch.tensor([3.0]), "b": torch.tensor([4.0])})
        tensor(5., dtype=torch.float64)
    """
    return dot(x, x).sqrt()


def cast(x: Tree, dtype: torch.dtype) -> Tree:
    """Return x with every leaf in `dtype` (a leaf that already is, is shared).

    Example:
        >>> cast({"w": torch.ones(1)}, torch.float64)
        {'w': tensor([1.], dtype=torch.float64)}
    """
    return {name: leaf.to(dtype) for name, leaf in x.items()}


def zeros_like(x: Tree) -> Tree:
    """Return the zero vector of x's space.

    Example:
        >>> zeros_like({"w": torch.ones(2)})
        {'w': tensor([0., 0.])}
    """
    return {name: torch.zeros_like(leaf) for name, leaf in x.items()}


def size(x: Tree) -> int:
    """Count the coordinates of x (rows included, where leaves carry them).

    Example:
        >>> size({"w": torch.ones(2, 3), "b": torch.ones(3)})
        9
    """
    return sum(leaf.numel() for leaf in x.values())


def shards(x: Tree, y: Tree, columns: int = SHARD_COLUMNS) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Walk two trees of rows, `{name: [n, *s]}` and `{name: [m, *s]}`, in parameter shards.

    Yields:
        (name, [n, p], [m, p]) with p ≤ `columns`: views, nothing is copied where the leaves are contiguous.

    Example:
        >>> x = {"w": torch.ones(2, 5)}
        >>> [(name, list(left.shape)) for name, left, _ in shards(x, x, columns=3)]
        [('w', [2, 3]), ('w', [2, 2])]
    """
    for name in x:
        left = rearrange(x[name], "n ... -> n (...)")
        right = rearrange(y[name], "m ... -> m (...)")
        for start in range(0, left.shape[1], columns):
            yield name, left[:, start : start + columns], right[:, start : start + columns]


def check_names(
    given: Iterable[str], expected: Iterable[str], given_as: str = "one tree", expected_as: str = "the other"
) -> None:
    """Raise TreeError unless both have the same names: a name is never skipped silently.

    Example:
        >>> check_names(["w"], ["w", "b"], "grads", "params")
        Traceback (most recent call last):
        fkernel.errors.TreeError: grads lacks 'b', which params has. Both must name the same parameters.
    """
    given, expected = list(given), list(expected)
    if given == expected:
        return
    missing = [name for name in expected if name not in set(given)]
    extra = [name for name in given if name not in set(expected)]
    if missing or extra:
        parts = []
        if missing:
            parts.append(f"{given_as} lacks {listing(missing)}, which {expected_as} has")
        if extra:
            parts.append(f"{given_as} has {listing(extra)}, which {expected_as} lacks")
        raise TreeError("; ".join(parts) + ". Both must name the same parameters.")


def check_same(given: Tree, expected: Tree, given_as: str, expected_as: str) -> None:
    """Raise TreeError unless names, shapes and dtypes agree.

    Example:
        >>> check_same({"w": torch.ones(2)}, {"w": torch.ones(3)}, "direction", "params")
        Traceback (most recent call last):
        fkernel.errors.TreeError: direction['w'] has shape [2], params['w'] has [3].
    """
    check_names(given, expected, given_as, expected_as)
    check_tensors(given, given_as)
    for name, want in expected.items():
        have = given[name]
        if have.shape != want.shape:
            raise TreeError(
                f"{given_as}[{name!r}] has shape {list(have.shape)}, {expected_as}[{name!r}] has {list(want.shape)}."
            )
        if have.dtype != want.dtype:
            raise TreeError(
                f"{given_as}[{name!r}] is {have.dtype}, {expected_as}[{name!r}] is {want.dtype}; "
                f"convert one of them with fkernel.tree.cast."
            )


def check_tensors(x: Mapping[str, Any], what: str) -> None:
    """Raise TreeError for what is no mapping, and name the first leaf that is no dense tensor of real numbers.

    Example:
        >>> check_tensors({"w": [1.0]}, "params")
        Traceback (most recent call last):
        fkernel.errors.TreeError: params['w'] is a list; expected a dense tensor of real numbers.
    """
    if not isinstance(x, Mapping):
        raise TreeError(f"{what} is a {type(x).__name__}; expected {{name: tensor}}.")
    for name, leaf in x.items():
        given = "" if isinstance(leaf, Tensor) else f"a {type(leaf).__name__}"
        if not given and (leaf.layout != torch.strided or leaf.is_complex() or leaf.is_quantized):
            given = f"{leaf.dtype}, {leaf.layout}"
        if given:
            raise TreeError(f"{what}[{name!r}] is {given}; expected a dense tensor of real numbers.")


def check_finite(x: Mapping[str, Tensor], what: str) -> None:
    """Raise NonFiniteError naming the first leaf that holds a NaN or an infinity.

    Example:
        >>> check_finite({"w": torch.tensor([1.0, float("nan")])}, "grads")
        Traceback (most recent call last):
        fkernel.errors.NonFiniteError: grads['w'] holds 1 non-finite value(s) of 2; nothing was computed from them.
    """
    check_tensors(x, what)
    for name, leaf in x.items():
        if leaf.is_meta:
            raise TreeError(f"{what}[{name!r}] lies on the meta device and holds no values; expected numbers.")
        if not all_finite(leaf):
            bad = int((~torch.isfinite(leaf)).sum())
            raise NonFiniteError(
                f"{what}[{name!r}] holds {bad} non-finite value(s) of {leaf.numel()}; nothing was computed from them.",
                parameter=name,
            )


def all_finite(leaf: Tensor) -> bool:
    """Tell whether a tensor is free of NaN and infinity, in one pass without a mask of its size.

    A non-finite entry makes the sum non-finite; a finite tensor's sum can overflow, so only then look at each.

    Example:
        >>> all_finite(torch.tensor([1.0, float("inf")]))
        False
    """
    return bool(torch.isfinite(leaf.sum())) or bool(torch.isfinite(leaf).all())
