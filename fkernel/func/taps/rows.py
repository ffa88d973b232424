"""J by microbatches: by one plain pass, by vmap over a reverse pass, or one sequence at a time.

The implementation of `fkernel.func.gradient`, without input checks; values and gradients are checked.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.func import vmap
from torch.utils import _pytree as pytree

from fkernel.errors import FKernelError, ModelWarning, NonFiniteError
from fkernel.func.handles.forms import Handles, Piece, at, compress, is_bounded, materialize_into, summands, tensors
from fkernel.func.inputs.batch import length, take, trim
from fkernel.func.inputs.microbatch import microbatches
from fkernel.func.inputs.objective import Function, bare, check_values, name_of, own_width
from fkernel.func.inputs.validation import advice_on, check_output, check_rows, first_line
from fkernel.func.taps.batched import batch_plan, gradients, tapped
from fkernel.func.taps.plan import GradientPlan, backward
from fkernel.shapes import Tensor, Tree

ONE_AT_A_TIME = GradientPlan(looped=True)
"""The plan where vmap cannot transform f."""


def make_plan(f: Function, params: Tree, one: Any) -> GradientPlan:
    """Plan f's gradients, on a batch of one sequence that may be on the meta device.

    vmap is tried first even where it will not be used: it raises where f branches on values or draws random numbers, so
    that a batched pass would be wrong.
    """
    _mapped(f, {name: leaf.detach()[None] for name, leaf in params.items()}, one)
    return batch_plan(f, params, one) or GradientPlan()


def plan_of(f: Function, params: Tree, batch: Any) -> GradientPlan:
    """Plan f's gradients, on the first sequence of a batch.

    Where vmap cannot transform f, though plain autograd can, gradients are computed one sequence at a time, with a
    warning: results are the same, but slower.
    """
    one = trim(take(batch, slice(0, 1)))
    try:
        return make_plan(bare(f), params, one)
    except FKernelError:
        raise
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        if "called random operation" in str(error):
            raise
        looped_rows(bare(f), params, one)  # an error in f itself is raised by autograd
        warnings.warn(
            f"torch.func.vmap cannot follow {name_of(f)}, so gradients are taken one sequence at a time, which is as "
            f"exact and slower: {advice_on(error) or first_line(error)}.",
            ModelWarning,
            stacklevel=2,
        )
        return ONE_AT_A_TIME


def gradient_rows(f: Function, microbatch: int | None, plan: GradientPlan) -> Callable[[Tree, Any], Tree]:
    """Return J without input checks, for callers that have made them; values and gradients are checked.

    Factors are multiplied out into J's storage, which is allocated once and so faster than vmap's own rows.
    """

    def dense(params: Tree, batch: Any) -> Tree:
        n = length(batch)
        J = {name: leaf.new_empty(n, *leaf.shape) for name, leaf in params.items()}
        doubtful: set[str] = set()
        values = next(iter(params.values())).new_empty(n)
        for rows, part in microbatches(batch, microbatch, own_width(f)):
            handles, value = handles_of(bare(f), params, part, plan)
            for name, handle in handles.items():
                _write(handle, J[name], rows)
            doubtful.update(_doubtful(handles))
            values[rows] = value.to(values)
        check_values(values, name_of(f))
        check_rows({name: J[name] for name in params if name in doubtful})
        return J

    return dense


def _write(handle: Piece, J: Tensor, rows: slice | Tensor) -> None:
    """Write a microbatch's gradients into their rows of J."""
    if isinstance(handle, Tensor):
        J[rows] = handle
    elif isinstance(rows, slice):
        materialize_into(handle, J[rows])
    else:
        for i, row in enumerate(rows.tolist()):
            materialize_into(at(handle, slice(i, i + 1)), J[row : row + 1])


def handle_pieces(
    f: Function, params: Tree, batch: Any, pieces: Iterable[slice], plan: GradientPlan
) -> Iterator[Handles]:
    """Iterate over J in handles, by microbatch, without input checks; values and factors are checked."""
    for rows in pieces:
        handles, values = handles_of(bare(f), params, trim(take(batch, rows)), plan)
        try:
            check_values(values, name_of(f))
            _check_factors(handles)
        except NonFiniteError as error:
            raise error.at(rows.start) from None
        yield {name: compress(handle, params[name]) for name, handle in handles.items()}


def _check_factors(handles: Mapping[str, Piece]) -> None:
    """Raise NonFiniteError naming sequence and parameter where a handle's tensors are not finite."""
    for name in _doubtful(handles):
        for leaf in (leaf for leaf in tensors(handles[name]) if leaf.is_floating_point()):
            check_rows({name: leaf})


def _doubtful(handles: Mapping[str, Piece]) -> list[str]:
    """Find the parameters whose rows may not be finite, judging by factors."""
    return [name for name, handle in handles.items() if not all(is_bounded(part) for part in summands(handle))]


def handles_of(f: Function, params: Tree, batch: Any, plan: GradientPlan) -> tuple[dict[str, Piece], Tensor]:
    """Return J of one microbatch in handles, and f's values [n]."""
    if plan.looped:
        return looped_rows(f, params, batch)
    if plan.batched:
        return _batched_rows(f, params, batch, plan)
    return mapped_rows(f, params, batch)


def mapped_rows(f: Function, params: Tree, batch: Any) -> tuple[dict[str, Piece], Tensor]:
    """Return J of one microbatch by vmap, dense, and f's values [n].

    Autograd runs outside of vmap, on n copies of each parameter that share their storage: the gradient of Σ_n f_n with
    respect to copy n is ∇f_n, and one plain reverse pass gives all of them.
    """
    n = length(batch)
    copies = {name: leaf.detach().expand(n, *leaf.shape).requires_grad_() for name, leaf in params.items()}
    with torch.enable_grad():
        values = _mapped(f, copies, batch)
        total = values.sum()
    grads: Any = [None] * len(copies)
    if values.requires_grad:
        grads = torch.autograd.grad(total, [*copies.values()], allow_unused=True)
    return {
        name: leaf.new_zeros(()).expand(n, *leaf.shape) if g is None else g
        for (name, leaf), g in zip(params.items(), grads, strict=True)
    }, values.detach()


def _mapped(f: Function, copies: Tree, batch: Any) -> Tensor:
    """Evaluate f under vmap, each sequence as a batch of one."""

    def one(p: Tree, x: Any) -> Tensor:
        value = f(p, pytree.tree_map(lambda leaf: leaf[None] if isinstance(leaf, Tensor) else leaf, x))
        check_output(value, 1, per_sequence=True)
        return value[0]

    sequences = pytree.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, batch)
    return vmap(one, in_dims=(0, sequences), randomness="error")(copies, batch)


def _batched_rows(f: Function, params: Tree, batch: Any, plan: GradientPlan) -> tuple[dict[str, Piece], Tensor]:
    n = length(batch)
    tape = tapped(f, params, (batch,), n, plan)
    check_output(tape.values, n, per_sequence=True)
    backward(tape)
    return gradients(tape, params, n), tape.values.detach()


def looped_rows(f: Function, params: Tree, batch: Any) -> tuple[dict[str, Piece], Tensor]:
    """Return J of one microbatch by one plain reverse pass a sequence, dense, and f's values [n]."""
    n = length(batch)
    J: dict[str, Piece] = {name: leaf.new_empty(n, *leaf.shape) for name, leaf in params.items()}
    values = next(iter(params.values())).new_empty(n)
    for i in range(n):
        value, pull = pull_back(f, params, take(batch, slice(i, i + 1)), 1)
        values[i] = value[0]
        for name, leaf in pull(torch.ones_like(value)).items():
            J[name][i] = leaf  # pyright: ignore[reportIndexIssue]
    return J, values


def pull_back(f: Function, params: Tree, batch: Any, n: int) -> tuple[Tensor, Callable[[Tensor], Tree]]:
    """Return f of n sequences, [n], and w ↦ Jᵀw, by one plain reverse pass."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
    with torch.enable_grad():
        value = f(leaves, batch)
    check_output(value, n, per_sequence=True)

    def pull(weights: Tensor) -> Tree:
        if not value.requires_grad:
            return {name: torch.zeros_like(leaf) for name, leaf in params.items()}
        grads = torch.autograd.grad(value, [*leaves.values()], weights, allow_unused=True)
        return {
            name: torch.zeros_like(leaf) if g is None else g
            for (name, leaf), g in zip(params.items(), grads, strict=True)
        }

    return value.detach(), pull
