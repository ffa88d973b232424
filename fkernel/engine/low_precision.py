"""K_EU from gradients that are stored in half the bytes, with a measured error bound for each entry.

One batch's gradients x are stored rounded, x̂ = x + δx; the other's y stream past unrounded and are not stored.
With D = diag(d) of any sign, entry by entry

    K̂ − K = ⟨x̂, D y⟩ − ⟨x, D y⟩ = ⟨δx, D y⟩ = Σ_s ⟨√|D| δx, sign(D) √|D| y⟩_s

where s walks shards: ranges of a parameter's leading dimension. By Cauchy and Schwarz in every shard

    |K̂ − K|[e, u] ≤ B[e, u] = Σ_s ε_s[x] η_s[y],      ε_s[x] = ‖√|D| δx‖_s,      η_s[y] = ‖√|D| y‖_s

which is never larger than the bound of one shard, ‖√|D| δx‖ ‖√|D| y‖ (Cauchy and Schwarz once more, over s), and
vanishes where x and y live in different shards, as two sequences' rows of a vocabulary mostly do. Nothing about the
number format is assumed: what is stored may be factors (`fkernel.func.handles.forms`), so δx is a difference of
products of them. ε is measured when x is stored, by multiplying out both forms, a tile at a time, in float64 (they
agree in their leading digits); η when y streams past. Then B = ε ηᵀ is one small product.

B bounds the error of storage only. Rounding while gradients are computed and contracted in the parameters' dtype is
not included: the exact kernel has it too, and for float32 parameters it was some thousandths of the error of bfloat16
storage, and hundredths of float16's. B ignores cancellation within a shard, while rounding errors have nearly random
signs, so it is looser with more parameters: its largest entry was 2 to 19 times the largest error with 2·10³
parameters, 20 times with 7·10⁴, 60 times with 10⁶.

Source: the inequality of A.-L. Cauchy (1821) and H. A. Schwarz (1888); N. J. Higham, "Accuracy and Stability of
Numerical Algorithms" (2002), §3, for bounds that are computed along with the result.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import Any, NamedTuple

import torch

from fkernel import func, tree
from fkernel.boundary import public
from fkernel.engine.batching import SortedBatch, check_sides, cuts_of, error_context
from fkernel.engine.gradients import Gradients, computed
from fkernel.engine.planning import usual_microbatch
from fkernel.engine.planning.strategy import default
from fkernel.engine.recycling import reuse_memory
from fkernel.errors import NonFiniteError, TreeError
from fkernel.func.handles import (
    Handle,
    Handles,
    SparseRows,
    count,
    each_tensor,
    key_of,
    materialize_into,
    packed,
    shape_of,
    stack_handles,
    tensors,
    tile_columns,
)
from fkernel.func.inputs import Function
from fkernel.precond import Diagonal, Preconditioner
from fkernel.shapes import Tensor, Tree

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SHARDS = 256
"""Largest number of shards of a parameter; each costs a float64 a sequence, little beside its factors."""
SLACK = 1 + 2.0**-20
"""Covers the rounding of the norms themselves, and of B to the result's dtype."""


class Rounded(NamedTuple):
    """A kernel from rounded gradients, with a bound on the rounding error.

    Attributes:
        values: K̂, [n_E n_U].
        bound: B, [n_E n_U]; |K̂ − K| ≤ B entry by entry, up to the rounding of the exact kernel.
        dtype: what the held gradients were stored in.
    """

    values: Tensor
    bound: Tensor
    dtype: torch.dtype


@public
def low_precision_kernel(
    f: Function,
    params: Tree,
    E: Any,
    U: Any,
    precond: Preconditioner,
    *,
    dtype: torch.dtype = torch.bfloat16,
    microbatch: int | None = None,
) -> Rounded:
    """Compute the kernel between two batches from gradients stored in fewer bytes, with a bound on every entry's error.

    K̂[e, u] = ⟨∇f(e; θ) + δ, P ∇f(u; θ)⟩,    |K̂ − K|[e, u] ≤ B[e, u]

    The smaller side (E where they are equal) is stored rounded, so that K̂ of a batch with itself is symmetric only to
    within B. B costs multiplying out every gradient once more, the stored ones twice.

    Args:
        f: (params, batch) -> [n].
        params: {name: tensor}, θ.
        E: the evaluation batch, n_E sequences (the rows).
        U: the update batch, n_U sequences (the columns).
        precond: P, a diagonal, of any sign: `precond.identity()`, `precond.diagonal(d)`, `precond.adam(state)`.
        dtype: what the held gradients are stored in, no wider than the parameters: torch.bfloat16 (8 significant bits,
            float32's range), torch.float16 (11 bits, up to 65504), or the parameters' own (no rounding: B = 0).
        microbatch: as in `fkernel.kernel`.

    Returns:
        `Rounded`: values and bound, [n_E n_U] in the parameters' dtype, in units of f², times P's.

    Raises:
        TreeError: P is not diagonal, or of other parameters; dtype is none of the above.
        NonFiniteError: a gradient overflows dtype (names the sequence and the parameter), or is not finite itself.
        BatchError, ModelError: as `fkernel.kernel`.

    Example:
        >>> from fkernel import precond
        >>> f = lambda params, x: x @ params["w"]
        >>> x = torch.tensor([[1.0, 1 / 3]])
        >>> K = low_precision_kernel(f, {"w": torch.zeros(2)}, x, torch.ones(2, 2), precond.identity())
        >>> K.values, K.bound
        (tensor([[1.3340, 1.3340]]), tensor([[0.0007, 0.0007]]))

    Source: see the top of this module.
    """
    check_sides(f, params, E, U)
    d = _diagonal_of(precond, params)
    _check_dtype(dtype, params)
    microbatch = usual_microbatch(microbatch, E, U)
    with reuse_memory():
        return _executed(params, SortedBatch("E", E, f), SortedBatch("U", U, f), d, dtype, microbatch)


def _executed(
    params: Tree, E: SortedBatch, U: SortedBatch, d: Tree | None, dtype: torch.dtype, microbatch: int
) -> Rounded:
    how = default(len(E), len(U), max(E.tokens[0], U.tokens[0]), microbatch, dense_U=False)
    J = {side.name: computed(side, ((1.0, params),), cuts_of(side, how.tokens), promised=True) for side in (E, U)}
    held, streamed = (J["E"], J["U"]) if how.held == "E" else (J["U"], J["E"])
    stored, ε = _stored(held, d, dtype)
    K = ε.new_empty(len(held), len(streamed), dtype=_widest(params))
    B = torch.empty_like(K)
    for block in streamed.blocks(how.block):
        columns, part = streamed.rows(block), streamed.gathered(block)
        B[:, columns] = SLACK * ε @ shard_norms(part, d).T
        K[:, columns] = func.contract(stored, part, diagonal=d)
        del part
    # Rows and columns from sorted order to the caller's.
    K, B = (each[held.side.order.argsort()][:, streamed.side.order.argsort()] for each in (K, B))
    return Rounded(K, B, dtype) if how.held == "E" else Rounded(K.T.contiguous(), B.T.contiguous(), dtype)


def _stored(held: Gradients, d: Tree | None, dtype: torch.dtype) -> tuple[Handles, Tensor]:
    """Round a batch's gradients and measure the error: (x̂, ε [n shards])."""
    kept, errors = list[Handles](), list[Tensor]()
    for i, rows in enumerate(held.cuts):
        exact = held.read(i)
        with error_context(held.side.name, held.side.order[rows]):
            kept.append(packed(narrowed(exact, dtype)))
        errors.append(shard_norms(exact, d, less=kept[-1]))
        del exact
    return stack_handles(kept), torch.cat(errors)


def narrowed(handles: Handles, dtype: torch.dtype) -> Handles:
    """Round the tensors of handles to a dtype; shared tensors stay shared, ids and narrower tensors unchanged.

    Args:
        handles: of one microbatch, {name: handle} of n sequences.
        dtype: such as torch.bfloat16.

    Raises:
        NonFiniteError: a number overflows dtype.

    Example:
        >>> narrowed({"w": torch.tensor([[1 / 3]])}, torch.bfloat16)
        {'w': tensor([[0.3340]], dtype=torch.bfloat16)}
    """
    done: dict[tuple[object, ...], Tensor] = {}

    def narrow(leaf: Tensor) -> Tensor:
        if not leaf.is_floating_point() or leaf.dtype.itemsize <= dtype.itemsize:
            return leaf
        if (key := key_of(leaf)) not in done:
            # An expanded dimension (stride 0) stays expanded.
            once = leaf[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in leaf.stride())]
            done[key] = once.to(dtype).expand(leaf.shape)
        return done[key]

    small = {name: each_tensor(narrow, handle) for name, handle in handles.items()}
    for name, handle in small.items():
        for wide, narrower in zip(tensors(handles[name]), tensors(handle), strict=True):
            _check_range(wide, narrower, name)
    return small


def _check_range(wide: Tensor, narrow: Tensor, name: str) -> None:
    if narrow is wide or tree.all_finite(narrow):
        return
    row = int((~torch.isfinite(narrow)).reshape(len(narrow), -1).any(1).nonzero()[0])
    wider = torch.bfloat16 if narrow.dtype == torch.float16 else wide.dtype
    largest, end = float(wide[row].abs().max()), torch.finfo(narrow.dtype).max
    raise NonFiniteError(
        f"The gradient of sequence {{row}} with respect to {name!r} overflows {narrow.dtype}: it is stored with "
        f"numbers up to {largest:.3g}, and {narrow.dtype} ends at {end:.3g}. Store it in {wider}.",
        row=row,
        parameter=name,
    )


def shard_norms(x: Handles, d: Tree | None, less: Handles | None = None) -> Tensor:
    """Measure the norms of every sequence's gradient, shard by shard.

    N[n, s] = ‖√|D| (x_n − x̂_n)‖_s

    Args:
        x: gradients of one microbatch, n sequences.
        d: D, {name: [*shape]}; None for ones.
        less: x̂, of the same sequences and kinds of handles; None for zero. With it, tiles are formed in float64.

    Returns:
        [n, shards] float64, parameters in x's order. The shards depend on the parameters' shapes alone.

    Example:
        >>> shard_norms({"w": torch.tensor([[3.0, 4.0]])}, {"w": torch.tensor([1.0, -4.0])})
        tensor([[3., 8.]], dtype=torch.float64)
    """
    return torch.cat(
        [
            _norms(handle, None if d is None else d[name], None if less is None else less[name])
            for name, handle in x.items()
        ],
        dim=1,
    )


def _norms(x: Handle, d: Tensor | None, less: Handle | None) -> Tensor:
    n, shape, leaf = count(x), shape_of(x) or (1,), tensors(x)[-1]
    per_shard = max(1, math.ceil(shape[0] / SHARDS))
    at = torch.arange(shape[0], device=leaf.device)
    if isinstance(x, SparseRows):  # only the table rows that were looked up
        at, ids = torch.unique(x.ids, return_inverse=True)
        x = x._replace(ids=ids, size=len(at))
        less = less._replace(ids=ids, size=len(at)) if isinstance(less, SparseRows) else less
    dtype = leaf.dtype if less is None else torch.float64
    squares = leaf.new_zeros(n, math.ceil(shape[0] / per_shard), dtype=torch.float64)
    step = max(1, tile_columns(2 * n, dtype.itemsize) // max(1, math.prod(shape[1:])))
    for start in range(0, len(at), step):
        rows = at[start : start + step]
        tile = _formed(x, start, len(rows), dtype)
        if less is not None:
            tile -= _formed(less, start, len(rows), dtype)
        if d is not None:
            tile *= d.reshape(shape[0], -1)[rows].abs().sqrt()
        norms = torch.linalg.vector_norm(tile, dim=2, dtype=torch.float64)
        squares.index_add_(1, rows // per_shard, norms.square_())
    return squares.sqrt_()


def _formed(x: Handle, start: int, r: int, dtype: torch.dtype) -> Tensor:
    """Write out rows start … start + r of the leading dimension, [n, r, width]."""
    x = x[:, None] if isinstance(x, Tensor) and x.ndim == 1 else x
    out = tensors(x)[-1].new_empty(count(x), r, *shape_of(x)[1:], dtype=dtype)
    materialize_into(x, out, start)
    return out.view(count(x), r, -1)


def _widest(params: Tree) -> torch.dtype:
    return reduce(torch.promote_types, (leaf.dtype for leaf in params.values()))


def _diagonal_of(precond: Preconditioner, params: Tree) -> Tree | None:
    """Return D of a diagonal P, checked against the parameters."""
    if not isinstance(precond, Diagonal):
        raise TreeError(
            f"The preconditioner is a {type(precond).__name__}; the error of rounded gradients is bounded under a "
            f"diagonal only, as precond.identity, precond.diagonal and precond.adam make. Give one of those, or use "
            f"fkernel.kernel, which takes any linear map and rounds nothing."
        )
    if precond.d is not None:
        tree.check_names(params, precond.d, "params", "the preconditioner")
        for name, leaf in params.items():
            if precond.d[name].shape != leaf.shape:
                raise TreeError(
                    f"params[{name!r}] has shape {list(leaf.shape)}; the preconditioner's has "
                    f"{list(precond.d[name].shape)}."
                )
    return precond.d


def _check_dtype(dtype: torch.dtype, params: Tree) -> None:
    widest = _widest(params)
    if dtype not in DTYPES or dtype.itemsize > widest.itemsize:
        raise TreeError(
            f"dtype is {dtype}; gradients of {widest} parameters are stored in torch.bfloat16, torch.float16 or a "
            f"wider type up to {widest}."
        )
