"""K_EU = J_E P J_Uᵀ, streamed, and K_EU A without K.

    kernel      K[e, u] = ⟨∇f(e), P ∇f(u)⟩           per-sequence gradients of both sides, contracted
    influence   K A = J_E (P (J_Uᵀ A))              one vjp over U, one transform, one jvp over E

P stands between the two gradients once. Rows are E, columns are U.

The smaller side's gradients are held, the other side's are streamed past them a microbatch at a time. Where the held
side does not fit the grant it is held a tile at a time, and the streamed side is computed anew for every tile.

Source: the kernel is the Fisher kernel of T. Jaakkola & D. Haussler (1998), with the optimizer's diagonal in place of
the inverse Fisher matrix; for f = log π and P = I it is the neural tangent kernel of A. Jacot et al. (2018).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fkernel import func
from fkernel.errors import NonFiniteError
from fkernel.func.batch import length, take
from fkernel.func.microbatch import slices
from fkernel.func.objective import Function
from fkernel.kernel.budget import rows_that_fit
from fkernel.precond import Preconditioner
from fkernel.shapes import Tensor, Tree

MICROBATCH = 8
"""Sequences under way at once; on a CPU, larger ones are no faster (see benchmarks/)."""


def kernel(
    f: Function,
    params: Tree,
    E: Any,
    U: Any,
    precond: Preconditioner,
    *,
    memory: int | str | None = None,
    microbatch: int = MICROBATCH,
) -> Tensor:
    """Compute the kernel between two batches.

    K[e, u] = ⟨∇f(e; θ), P ∇f(u; θ)⟩

    Args:
        f: (params, batch) -> [n], such as `func.sequence_logprob(apply)`.
        params: {name: tensor}, θ.
        E: the evaluation batch, n_E sequences (the rows).
        U: the update batch, n_U sequences (the columns).
        precond: P, any linear map tree → tree; it is given rows {name: [n, *shape]} of U's gradients.
        memory: bytes (or "8GiB") granted to gradients; None holds the smaller side whole. Activations of a microbatch
            and P itself come on top.
        microbatch: sequences under way at once.

    Returns:
        [n_E, n_U] in the parameters' dtype; positive where u's gradient raises f of e. Units: f², times P's.

    Raises:
        BatchError, TreeError, ModelError, NonFiniteError: the inputs are at fault, or a gradient is not finite; a row
            in the message counts within the batch that it names.

    Example:
        >>> from fkernel import precond
        >>> f = lambda params, x: x @ params["w"]
        >>> kernel(f, {"w": torch.zeros(2)}, torch.eye(2), torch.ones(3, 2), precond.identity())
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """
    n_E, n_U = length(E), length(U)
    gradient = func.per_sequence_grad(f, microbatch)
    rows_E = _naming("E", lambda batch: gradient(params, batch))
    rows_U = _naming("U", lambda batch: precond(gradient(params, batch)))
    held, streamed, hold, stream = (E, U, rows_E, rows_U) if n_E <= n_U else (U, E, rows_U, rows_E)
    K = torch.empty(length(held), length(streamed), dtype=_dtype(params), device=_device(params))
    capacity = rows_that_fit(params, memory, length(held), microbatch)
    for tile in slices(length(held), capacity):
        J = hold(take(held, tile), tile.start)
        for columns in slices(length(streamed), microbatch):
            K[tile, columns] = func.contract(J, stream(take(streamed, columns), columns.start))
    return K if held is E else K.T.contiguous()


def influence(
    f: Function,
    params: Tree,
    E: Any,
    U: Any,
    precond: Preconditioner,
    weights: Tensor,
    *,
    memory: int | str | None = None,
    microbatch: int = MICROBATCH,
) -> Tensor:
    """Compute what a weighted update batch does to every sequence of E, without any per-sequence gradient.

    K_EU w = J_E (P (J_Uᵀ w))

    Args:
        f: (params, batch) -> [n].
        params: {name: tensor}, θ.
        E: the evaluation batch, n_E sequences.
        U: the update batch, n_U sequences.
        precond: P, any linear map tree → tree; it is given one tree {name: [*shape]}.
        weights: [n_U]; for a policy gradient, c·w_u·A_u.
        memory: accepted for symmetry with `kernel`; three vectors of the parameters' size are all that is held, so a
            grant below that is refused.
        microbatch: sequences under way at once.

    Returns:
        [n_E]; equals `kernel(...) @ weights`. The peak memory does not depend on n_U.

    Raises:
        As `kernel`.

    Example:
        >>> from fkernel import precond
        >>> f = lambda params, x: x @ params["w"]
        >>> influence(f, {"w": torch.zeros(2)}, torch.eye(2), torch.ones(3, 2), precond.identity(), torch.ones(3))
        tensor([3., 3.])
    """
    rows_that_fit(params, memory, 1, 1)
    towards = _naming("U", lambda batch: func.vjp(f, microbatch)(params, batch, weights))(U, 0)
    move = precond(towards)
    return _naming("E", lambda batch: func.jvp(f, microbatch)(params, batch, move))(E, 0)


def _naming(side: str, compute: Callable[[Any], Any]) -> Callable[[Any, int], Any]:
    """Say which batch, and which of its rows, a non-finite value belongs to."""

    def named(batch: Any, start: int) -> Any:
        try:
            return compute(batch)
        except NonFiniteError as error:
            row = None if error.row is None else start + error.row
            place = f"In {side}" if row is None else f"In {side}, row {row} of the whole batch"
            raise NonFiniteError(f"{place}: {error}", row=row, parameter=error.parameter) from error

    return named


def _dtype(params: Tree) -> torch.dtype:
    return next(iter(params.values())).dtype


def _device(params: Tree) -> torch.device:
    return next(iter(params.values())).device
