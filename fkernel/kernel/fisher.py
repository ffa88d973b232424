"""K_EU = J_E P J_Uᵀ, streamed, and K_EU A without K.

    kernel      K[e, u] = ⟨∇f(e), P ∇f(u)⟩           per-sequence gradients of both sides, contracted
    influence   K A = J_E (P (J_Uᵀ A))              one vjp over U, one transform, one jvp over E

P stands between the two gradients once. Rows are E, columns are U.

The smaller side's gradients are held, as handles (`fkernel.func.handles`), and the other side's are streamed past
them a block at a time; a diagonal P is multiplied into the shards of their contraction, any other P is applied to
dense rows of U. Where the held side does not fit the grant it is held a tile at a time, and the streamed side is
computed anew for every tile.

Source: the kernel is the Fisher kernel of T. Jaakkola & D. Haussler (1998), with the optimizer's diagonal in place of
the inverse Fisher matrix; for f = log π and P = I it is the neural tangent kernel of A. Jacot et al. (2018).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fkernel import func, tree
from fkernel.errors import BatchError, NonFiniteError
from fkernel.func.batch import length, take
from fkernel.func.boundary import check_inputs, explained
from fkernel.func.gradient import gradient_rows, handle_rows, plan_of
from fkernel.func.handles import Handles
from fkernel.func.microbatch import slices
from fkernel.func.objective import Function
from fkernel.kernel.budget import check_vectors_fit, rows_that_fit
from fkernel.precond import Diagonal, Preconditioner
from fkernel.shapes import Tensor, Tree

BLOCK = 64
"""Sequences of the streamed side whose gradients are held at a time."""
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
        >>> import torch
        >>> from fkernel import precond
        >>> f = lambda params, x: x @ params["w"]
        >>> kernel(f, {"w": torch.zeros(2)}, torch.eye(2), torch.ones(3, 2), precond.identity())
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """
    check_sides(f, params, E, U)
    n_E, n_U = length(E), length(U)
    D = precond.d if isinstance(precond, Diagonal) else None
    with explained(params):
        plan = plan_of(f, params, take(E, slice(0, 1)))
    handles, dense = handle_rows(f, microbatch, plan), gradient_rows(f, microbatch, plan)

    def rows_E(batch: Any, start: int) -> Handles:
        with naming("E", start), explained(params):
            return handles(params, batch)

    def rows_U(batch: Any, start: int) -> Handles:
        with naming("U", start), explained(params):
            if isinstance(precond, Diagonal):
                return handles(params, batch)
            J = dense(params, batch)
        return _transformed(precond, J)

    held, streamed, hold, stream = (E, U, rows_E, rows_U) if n_E <= n_U else (U, E, rows_U, rows_E)
    K = next(iter(params.values())).new_empty(length(held), length(streamed))
    capacity = rows_that_fit(params, memory, length(held), microbatch)
    # The held side's factors are multiplied out once a block, so a block is no smaller than they are many.
    block = max(BLOCK, length(held)) if memory is None else microbatch
    for tile in slices(length(held), capacity):
        J = hold(take(held, tile), tile.start)
        for columns in slices(length(streamed), block):
            K[tile, columns] = func.contract(J, stream(take(streamed, columns), columns.start), diagonal=D)
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
        memory: bytes granted to gradients. Three vectors of the parameters' size are held; a grant below is refused.
        microbatch: sequences under way at once.

    Returns:
        [n_E]; equals `kernel(...) @ weights`. The peak memory does not depend on n_U.

    Raises:
        As `kernel`.

    Example:
        >>> import torch
        >>> from fkernel import precond
        >>> f = lambda params, x: x @ params["w"]
        >>> influence(f, {"w": torch.zeros(2)}, torch.eye(2), torch.ones(3, 2), precond.identity(), torch.ones(3))
        tensor([3., 3.])
    """
    check_sides(f, params, E, U)
    check_vectors_fit(params, memory)
    with naming("U"):
        towards = func.vjp(f, microbatch)(params, U, weights)
    move = _transformed(precond, towards)
    with naming("E"):
        return func.jvp(f, microbatch)(params, E, move)


def check_sides(f: Function, params: Tree, E: Any, U: Any) -> None:
    """Check both batches before anything is computed from either, and say which one is at fault."""
    for side, batch in (("E", E), ("U", U)):
        with naming(side):
            check_inputs(f, params, batch)


@contextmanager
def naming(side: str, start: int = 0) -> Iterator[None]:
    """Say which batch an error belongs to, and count its row within the whole of it."""
    try:
        yield
    except NonFiniteError as error:
        place = "" if error.row is None else f"In {side}, row {{row}} of the whole batch: "
        raise error.at(start, place) from error
    except BatchError as error:
        raise BatchError(f"In {side}: {error}") from error


def _transformed(precond: Preconditioner, x: Tree) -> Tree:
    """P x, where P may be anything that a caller wrote."""
    image = precond(x)
    tree.check_names(image, x, "the preconditioner's result", "the gradients")
    tree.check_finite(image, "the preconditioner's result")
    return image
