"""⟨x_n, D y_m⟩ and other products of two sets of gradients, in one pass over tiles of parameter space.

    kernels    K[n, m] = Σ_names Σ_α x[name][n, α] · D[name][α] · y[name][m, α]    the einsum of a kernel; of any D
    along      ⟨x_n, v⟩ = Σ_α x_nα v_α                                             one more column of the product
    squares    Σ_α d_α x_nα²                                                       ‖x‖² for ones, K_nn for D

Parameters are cut into shards of columns; each shard is one GEMM in at least float32, and shards are added up in
float64, so that the error does not grow with the number of parameters. Half-precision storage is widened a shard at a
time. A handle (`fkernel.func.handles.forms`) is multiplied out a shard at a time, in storage that is allocated once,
and all products are computed from the shard: multiplying out costs about a third of a backward pass, so it is done
once. D is multiplied into the smaller shard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch

from fkernel import tree
from fkernel.boundary import public
from fkernel.errors import BatchError, NonFiniteError, TreeError
from fkernel.func.handles.forms import Handle, Handles, SparseRows, compressed, count, shape_of, tensors
from fkernel.func.handles.shards import tile_columns, tiles
from fkernel.func.inputs.validation import check_rows
from fkernel.shapes import Tensor, Tree

RUN = 8192
"""Columns that are summed in a tile's own dtype before float64, for the same accuracy as a kernel's."""


@public
def contract(x: Handles, y: Handles, *, diagonal: Tree | None = None, jit: bool | None = None) -> Tensor:
    """Compute all inner products between two sets of per-sequence gradients.

    K[n, m] = Σ_α x[n, α] D[α] y[m, α]

    Args:
        x: {name: [n, *shape]}, or handles of such gradients, in any mix.
        y: {name: [m, *shape]} or handles, the same names and shapes (not necessarily dtypes).
        diagonal: D, {name: [*shape]}; None for ones.
        jit: compile the shard's einsum with torch.compile. None compiles on an accelerator only: on a CPU a shard is
            one BLAS call already, and compiling costs seconds (`benchmarks/test_contract.py` measures both).

    Returns:
        [n, m] in the widest of the dtypes, at least float32.

    Raises:
        TreeError: names or shapes disagree.
        BatchError: x or y has no rows.
        NonFiniteError: a row holds NaN or infinity; it names the row and the parameter.

    Example:
        >>> x = {"w": torch.tensor([[1.0, 0.0], [0.0, 2.0]])}
        >>> contract(x, {"w": torch.tensor([[3.0, 4.0]])})
        tensor([[3.],
                [8.]])
    """
    n, m = rows_of(x, "x"), rows_of(y, "y")
    check_fit(x, y, diagonal)
    products = Products(ProductSpec({"": diagonal}), n, m, device_of(x), jit)
    products.add(x, y)
    return products.kernel().to(widest(x, y))


class RowSpec(NamedTuple):
    """Products of every row of one batch alone.

    Attributes:
        along: {name: v}, for ⟨x_n, v⟩.
        squares: {name: d}, for Σ_α d_α x_nα²; None for ones.
    """

    along: Mapping[str, Tree] = {}
    squares: Mapping[str, Tree | None] = {}


class ProductSpec(NamedTuple):
    """The products of two batches' gradients to compute.

    Attributes:
        kernels: {name: D}, for ⟨x_n, D y_m⟩; None for ones.
        x: products of one batch alone.
        y: of the other.
        key: name of a parameter ↦ group; sums are kept by group, and add up to the whole.
    """

    kernels: Mapping[str, Tree | None] = {}
    x: RowSpec = RowSpec()
    y: RowSpec = RowSpec()
    key: Callable[[str], str] = lambda name: ""


class Products:
    """Accumulates the products of a `ProductSpec` over blocks of gradients and groups of parameters.

    Attributes:
        kernels: {name: {group: [n m]}} float64.
        x: {name: {group: [n]}} float64, of one batch alone.
        y: {name: {group: [m]}} float64.

    Example:
        >>> J, D = {"w": torch.tensor([[3.0, 4.0]])}, {"w": torch.tensor([1.0, 0.5])}
        >>> products = Products(ProductSpec({"K": D}, x=RowSpec({"step": D}, {"norm": None})), 1, 1)
        >>> products.add(J, J)
        >>> products.kernel("K").item(), products.whole("x", "step").item(), products.whole("x", "norm").item()
        (17.0, 5.0, 25.0)
    """

    def __init__(self, spec: ProductSpec, n: int, m: int, device: torch.device | None = None, jit: bool | None = None):
        """Start from zeros, for n rows and m columns."""
        self.spec, self.n, self.m, self.device = spec, n, m, device
        compiled = (device is not None and device.type != "cpu") if jit is None else jit
        self._shard = _compiled() if compiled else _einsum
        self.kernels: dict[str, dict[str, Tensor]] = {what: {} for what in spec.kernels}
        self.x, self.y = ({what: {} for what in (*own.along, *own.squares)} for own in (spec.x, spec.y))

    def kernel(self, what: str = "") -> Tensor:
        """Return one of the kernels over all parameters, [n m] float64."""
        return torch.stack([*self.kernels[what].values()]).sum(0)

    def whole(self, side: str, what: str) -> Tensor:
        """Return a product of one batch alone over all parameters, [n] float64; `side` is "x" or "y"."""
        return torch.stack([*getattr(self, side)[what].values()]).sum(0)

    def add(
        self,
        x: Handles,
        y: Handles,
        columns: slice | None = None,
        rows: slice | None = None,
        *,
        own_x: bool = True,
        own_y: bool = True,
    ) -> None:
        """Add the products of some gradients: of all or some rows, columns and parameters.

        Args:
            x: {name: [n, *shape]}, or handles.
            y: of the columns; x itself for products with itself, which is then written out once.
            columns: range of the m columns; None for all.
            rows: range of the n rows; None for all.
            own_x: whether to add products of x alone; True only once where x comes with several blocks of columns.
            own_y: the same for y.

        Raises:
            As `contract`.
        """
        at = slice(0, self.n) if rows is None else rows, slice(0, self.m) if columns is None else columns
        for side, handles in (("x", x), ("y", y)):
            rows_of(handles, side)
        check_fit(x, y, None)
        for D in self.spec.kernels.values():
            check_shapes(x, D)
        dtype = widest(x, y)
        mine, others = (self.spec.x if own_x else RowSpec()), (self.spec.y if own_y else RowSpec())
        with torch.no_grad():
            for name in x:
                self._walk(name, x[name], y[name], at, mine, others, dtype)
        self._check(x, y, at)

    def _walk(
        self,
        name: str,
        x: Handle,
        y: Handle,
        at: tuple[slice, slice],
        mine: RowSpec,
        others: RowSpec,
        dtype: torch.dtype,
    ) -> None:
        """Add the products of one parameter, in shards [n c], [m c]."""
        group, same = self.spec.key(name), x is y
        x, y, of = _aligned(x, y)
        n, m, shape = count(x), count(y), shape_of(x)
        width = math.prod(shape[1:])
        step = max(1, tile_columns(n + m, dtype.itemsize) // width)
        tile_x, tile_y = tiles(x, step, dtype), tiles(y, step, dtype)
        kernels = [
            (self._sums(self.kernels[what], group, self.n, self.m)[at], None if D is None else of(D[name]))
            for what, D in self.spec.kernels.items()
        ]
        left_alone = _Sums(mine, name, of, lambda what: self._sums(self.x[what], group, self.n)[at[0]])
        right_alone = _Sums(others, name, of, lambda what: self._sums(self.y[what], group, self.m)[at[1]])
        room = tensors(x)[-1].new_empty(max(n, m) * min(step, shape[0]) * width, dtype=dtype)
        for start in range(0, shape[0], step):
            r = min(step, shape[0] - start)
            left = tile_x(start, r)
            right = left if same else tile_y(start, r)
            here = slice(start, start + r)
            for K, D in kernels:
                K += self._shard(*((left, right) if D is None else _scaled(left, right, D[here].reshape(-1), room)))
            left_alone.take(left, here, room)
            right_alone.take(right, here, room)

    def _sums(self, groups: dict[str, Tensor], group: str, *shape: int) -> Tensor:
        """Return the sums of one group, zeros at first."""
        if group not in groups:
            groups[group] = torch.zeros(shape, dtype=torch.float64, device=self.device)
        return groups[group]

    def _check(self, x: Handles, y: Handles, at: tuple[slice, slice]) -> None:
        """Raise NonFiniteError where a sum is not finite, naming the row whose gradient is the cause."""
        sums = [K[at] for groups in self.kernels.values() for K in groups.values()]
        sums += [each for side in (self.x, self.y) for groups in side.values() for each in groups.values()]
        if not all(map(tree.all_finite, sums)):
            for side in (x, y):
                check_rows({name: handle for name, handle in side.items() if isinstance(handle, Tensor)})
            for groups in self.x.values():
                bad = (~torch.isfinite(torch.stack([*groups.values()]).sum(0))).nonzero()
                if len(bad):
                    what = "The gradient of row {row} is not finite, or its norm overflows."
                    raise NonFiniteError(what, row=int(bad[0]))
            raise NonFiniteError("A product of finite gradients overflowed; contract in float64 (fkernel.tree.cast).")


def _aligned(x: Handle, y: Handle) -> tuple[Handle, Handle, Callable[[Tensor], Tensor]]:
    """Convert two handles of one parameter to the same tiling; also return how to index a vector of its shape."""
    same = x is y
    if isinstance(x, SparseRows) and isinstance(y, SparseRows):
        x, y, touched = compressed(x, y)
        return x, (x if same else y), lambda leaf: leaf[touched]
    if isinstance(x, Tensor) and isinstance(y, Tensor):  # no structure to follow
        x, y = (each.flatten(1) if each.ndim > 1 else each[:, None] for each in (x, y))
        return x, (x if same else y), lambda leaf: leaf.reshape(-1)
    return x, y, lambda leaf: leaf


class _Sums:
    """Products of one batch alone, for one parameter: ⟨x_n, v⟩ and Σ_α d_α x_nα²."""

    def __init__(self, own: RowSpec, name: str, of: Callable[[Tensor], Tensor], into: Callable[[str], Tensor]) -> None:
        self.along = [(into(what), of(vector[name])) for what, vector in own.along.items()]
        self.squares = [(into(what), None if d is None else of(d[name])) for what, d in own.squares.items()]

    def take(self, tile: Tensor, here: slice, room: Tensor) -> None:
        """Add one shard [n c]."""
        if self.along:
            _add_sums(self.along, here, tile)
        if self.squares:
            _add_sums(self.squares, here, torch.mul(tile, tile, out=room[: tile.numel()].view(tile.shape)))


def _add_sums(spec: Sequence[tuple[Tensor, Tensor | None]], here: slice, tile: Tensor) -> None:
    """Add ⟨x_n, v_k⟩ of a shard to the sums of each k, in float64 between runs of columns."""
    ones = tile.new_ones(tile.shape[1])
    vectors = torch.stack([ones if leaf is None else leaf[here].reshape(-1).to(ones) for _, leaf in spec])
    for columns, run in zip(vectors.split(RUN, 1), tile.split(RUN, 1), strict=True):
        for (total, _), sums in zip(spec, (run @ columns.mT).unbind(1), strict=True):
            total += sums


def _scaled(left: Tensor, right: Tensor, d: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply D into the smaller of two shards, in `room`: a shard may be a view of the caller's tensor."""
    small, other = (left, right) if len(left) <= len(right) else (right, left)
    scaled = torch.mul(small, d, out=room[: small.numel()].view(small.shape))
    return (scaled, other) if small is left else (other, scaled)


_einsum: Callable[[Tensor, Tensor], Tensor] = partial(torch.einsum, "np,mp->nm")
"""One shard, [n p], [m p] -> [n m]."""


@cache
def _compiled() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(lambda left, right: _einsum(left, right), dynamic=True)


def device_of(x: Handles) -> torch.device:
    """Return the device of gradients."""
    return tensors(next(iter(x.values())))[-1].device


def widest(x: Handles, y: Handles) -> torch.dtype:
    """Return the dtype of products of x and y: the widest, at least float32."""
    dtype = torch.float32
    for leaf in (leaf for side in (x, y) for handle in side.values() for leaf in tensors(handle)):
        if leaf.is_floating_point():
            dtype = torch.promote_types(dtype, leaf.dtype)
    return dtype


def rows_of(x: Handles, side: str) -> int:
    """Count the sequences; raise TreeError where parameters differ in their number, BatchError where there are none."""
    scalars = [name for name, handle in x.items() if isinstance(handle, Tensor) and handle.ndim == 0]
    counts = {-1} if scalars else {count(handle) for handle in x.values()}
    if len(counts) != 1 or -1 in counts:
        raise TreeError(f"{side} must hold per-sequence gradients {{name: [n, *shape]}} of one n; found n in {counts}.")
    (n,) = counts
    if n == 0:
        raise BatchError(f"{side} holds no rows; a kernel needs at least one sequence on each side.")
    return n


def check_fit(x: Handles, y: Handles, diagonal: Tree | None) -> None:
    """Raise TreeError unless x, y and the diagonal have the same parameters and shapes."""
    tree.check_names(y, x, "y", "x")
    if diagonal is not None:
        tree.check_names(x, diagonal, "the tree to precondition", "the preconditioner")
    for name in x:
        left, right = list(shape_of(x[name])), list(shape_of(y[name]))
        if left != right:
            raise TreeError(f"x[{name!r}] has rows of shape {left}, y[{name!r}] of {right}.")
    check_shapes(x, diagonal)


def check_shapes(x: Handles, diagonal: Tree | None) -> None:
    """Raise TreeError unless a diagonal has every parameter of x, in its shape."""
    if diagonal is None:
        return
    for name in x:
        shape = list(shape_of(x[name]))
        if name not in diagonal:
            raise TreeError(f"the tree to precondition has {name!r}, which the preconditioner lacks.")
        if list(diagonal[name].shape) != shape:
            raise TreeError(
                f"The tree's {name!r} has shape {shape} a row; the preconditioner's has {list(diagonal[name].shape)}."
            )
