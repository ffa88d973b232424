"""The derivatives of any f(params, batch) -> [n]: J, Jᵀw, Jv and vᵀHv.

J stacks the gradients of f, one row a sequence: J[x, α] = ∂f(x; θ)/∂θ_α. Then

    per_sequence_grad   J                  vmap over sequences of a reverse pass
    vjp                 Jᵀw = Σ_x w_x ∇f(x)  one reverse pass over the batch
    jvp                 Jv  = d/dε f(x; θ + εv)|₀        one forward-mode pass, about two evaluations
    curvature           vᵀH_x v = d²/dε² f(x; θ + εv)|₀  forward over forward

Every function here is made once from f, then called with (params, batch, …); `microbatch` bounds how many sequences
are under way at once and changes no value. They are final: their results carry no graph. To differentiate once
more, compose `torch.func` yourself, as `curvature` does.

Source: J. Bradbury et al., JAX autodiff cookbook (vmap, jvp, vjp); B. Pearlmutter, "Fast exact multiplication by the
Hessian" (1994), for forward-mode second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import func
from torch.utils import _pytree as pytree

from fkernel import tree
from fkernel.errors import NonFiniteError
from fkernel.func.batch import length, take, trim
from fkernel.func.boundary import boundary, check_direction, check_output, check_rows, check_weights
from fkernel.func.capture import Plan, backward, forward, handle_of, make_plan
from fkernel.func.elementary import elementary
from fkernel.func.handles import (
    Factored,
    Handles,
    Piece,
    Rows,
    at,
    form,
    is_bounded,
    smallest,
    stack_handles,
    summands,
    summed_up,
    tensors,
)
from fkernel.func.microbatch import groups, microbatches, stacked, summed, token_grant
from fkernel.func.objective import Function, bare, check_values, name_of
from fkernel.shapes import Shaped, Tensor, Tree


def per_sequence_grad(f: Function, microbatch: int | None = None) -> Callable[[Tree, Any], Tree]:
    """Make J: the gradient of every sequence by itself.

    J[x] = ∇_θ f(x; θ)

    Args:
        f: (params, batch) -> [n].
        microbatch: sequences of the greatest length under way at once, and so many tokens of shorter ones; None takes
            the whole batch.

    Returns:
        (params, batch) -> {name: [n, *shape]}, in the parameters' dtype; units of f per unit of parameter.

    Raises:
        BatchError, TreeError, ModelError, NonFiniteError: (when called) see `fkernel.func.boundary`; a non-finite
            gradient names the sequence and the parameter.

    Example:
        >>> f = lambda params, x: (x @ params["w"]) ** 2
        >>> per_sequence_grad(f)({"w": torch.tensor([1.0, 2.0])}, torch.eye(2))
        {'w': tensor([[2., 0.],
                      [0., 4.]])}
    """
    plans: dict[Any, Plan] = {}  # f's layers are found at the first call for a shape, and watched at every one

    def gradient(params: Tree, batch: Any) -> Tree:
        with boundary(f, params, batch):
            leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
            key = (*params, *(leaf.shape[1:] for leaf in leaves))
            if key not in plans:
                plans[key] = plan_of(f, params, batch)
            return gradient_rows(f, microbatch, plans[key])(params, batch)

    return gradient


def plan_of(f: Function, params: Tree, batch: Any) -> Plan:
    """Find the layers of f whose gradients factor, on the first sequence of a batch."""
    return make_plan(bare(f), params, trim(take(batch, slice(0, 1))))


def per_sequence_handles(f: Function, microbatch: int | None = None) -> Callable[[Tree, Any], Handles]:
    """Make J in its smallest exact form: factors of linear layers, rows of tables, dense where nothing is smaller.

    Arguments and errors as in `per_sequence_grad`, whose J this is: `fkernel.func.handles.form` writes it out.

    Returns:
        (params, batch) -> {name: handle}; see `fkernel.func.handles`. `contract` takes any mix of them.

    Example:
        >>> f = lambda params, x: torch.nn.functional.linear(x, params["w"]).square().sum((1, 2))
        >>> J = per_sequence_handles(f)({"w": torch.ones(8, 8)}, torch.ones(3, 2, 8))
        >>> type(J["w"]).__name__, list(J["w"].inputs.shape)
        ('Factored', [3, 2, 8])
    """

    def handles(params: Tree, batch: Any) -> Handles:
        with boundary(f, params, batch):
            pieces = groups(batch, token_grant(batch, microbatch))
            plan = plan_of(f, params, batch)
            return stack_handles(handle_pieces(f, params, batch, pieces, plan))

    return handles


def gradient_rows(f: Function, microbatch: int | None, plan: Plan) -> Callable[[Tree, Any], Tree]:
    """J without the checks of its inputs, for callers that have made them; values and gradients are still checked.

    Captured layers come as factors and are multiplied into J's storage, which is allocated once: that is faster than
    vmap's own rows, each of which is fresh memory. What no captured layer explains comes from vmap over a reverse pass.
    """

    def dense(params: Tree, batch: Any) -> Tree:
        n = length(batch)
        J = {name: leaf.new_empty(n, *leaf.shape) for name, leaf in params.items()}
        doubtful: set[str] = set()
        values = next(iter(params.values())).new_empty(n)
        for rows, part in microbatches(batch, microbatch):
            handles, value = handles_of(bare(f), params, part, plan)
            for name, handle in handles.items():
                _write(handle, J[name], rows)
            doubtful.update(_doubtful(handles))
            values[rows] = value
        check_values(values, name_of(f))
        check_rows({name: J[name] for name in params if name in doubtful})
        return J

    return dense


def _write(handle: Piece, J: Tensor, rows: slice | Tensor) -> None:
    """Write a microbatch's gradients into their rows of J."""
    if isinstance(handle, Tensor):
        J[rows] = handle
    elif isinstance(rows, slice):
        form(handle, J[rows])
    else:
        for i, row in enumerate(rows.tolist()):
            form(at(handle, slice(i, i + 1)), J[row : row + 1])


def handle_pieces(f: Function, params: Tree, batch: Any, pieces: Iterable[slice], plan: Plan) -> Iterator[Handles]:
    """J in handles, a microbatch at a time, without the checks of its inputs; values and factors are checked."""
    for rows in pieces:
        handles, values = handles_of(bare(f), params, trim(take(batch, rows)), plan)
        try:
            check_values(values, name_of(f))
            _check_factors(handles)
        except NonFiniteError as error:
            raise error.at(rows.start) from None
        yield {name: smallest(handle, params[name]) for name, handle in handles.items()}


def _check_factors(handles: Mapping[str, Piece]) -> None:
    """Raise NonFiniteError naming sequence and parameter where what a gradient is made of is not finite."""
    for name in _doubtful(handles):
        for leaf in (leaf for leaf in tensors(handles[name]) if leaf.is_floating_point()):
            check_rows({name: leaf})


def _doubtful(handles: Mapping[str, Piece]) -> list[str]:
    """Find the parameters whose rows may not be finite, as far as the factors tell."""
    return [name for name, handle in handles.items() if not all(is_bounded(part) for part in summands(handle))]


def handles_of(f: Function, params: Tree, batch: Any, plan: Plan) -> tuple[dict[str, Piece], Tensor]:
    """J of one microbatch in handles, and f's values [n]."""
    found = forward(f, params, batch, plan)
    dense = backward(found)
    factors: dict[str, list[Factored | Rows]] = {}
    for use in found.uses:
        handle = handle_of(use, len(params[use.parameter]))
        if handle is not None:
            factors.setdefault(use.parameter, []).append(handle)
    # A captured parameter that nothing used, or whose every cotangent was zero, has gradient zero.
    handles: dict[str, Piece] = {
        name: dense[name] if name in dense else summed_up(factors.get(name, []), leaf, length(batch))
        for name, leaf in params.items()
    }
    return handles, found.values.detach()


def pull_back(f: Function, params: Tree, batch: Any, n: int) -> tuple[Tensor, Callable[[Tensor], tuple[Tree]]]:
    """f of n sequences, [n], and w ↦ (Jᵀw,)."""

    def value_at(p: Tree) -> Tensor:
        value = f(p, batch)
        check_output(value, n, per_sequence=True)
        return value

    value, pull, *_ = func.vjp(value_at, params)
    return value, pull


def vjp(f: Function, microbatch: int | None = None) -> Callable[[Tree, Any, Tensor], Tree]:
    """Make w ↦ Jᵀw: the weighted sum of all gradients, by one reverse pass and without J.

    Jᵀw = Σ_x w_x ∇f(x; θ)

    Args:
        f: (params, batch) -> [n].
        microbatch: sequences under way at once; None takes the whole batch.

    Returns:
        (params, batch, weights [n]) -> {name: [*shape]}.

    Raises:
        BatchError, TreeError, ModelError, NonFiniteError: (when called) see `fkernel.func.boundary`; where the sum is
            not finite, the sequence and parameter that made it so are looked for and named.

    Example:
        >>> f = lambda params, x: (x @ params["w"]) ** 2
        >>> vjp(f)({"w": torch.tensor([1.0, 2.0])}, torch.eye(2), torch.tensor([1.0, -1.0]))
        {'w': tensor([ 2., -4.])}
    """

    def one_microbatch(params: Tree, batch: Any, weights: Tensor) -> tuple[Tree, Tensor]:
        value, pull = pull_back(bare(f), params, batch, length(batch))
        with torch.no_grad():
            return pull(weights.to(value.dtype))[0], value

    total = summed(one_microbatch, microbatch)

    def product(params: Tree, batch: Any, weights: Shaped[Tensor, " n"]) -> Tree:
        with boundary(f, params, batch):
            check_weights(weights, length(batch))
            g, values = total(params, batch, weights)
        check_values(values, name_of(f))
        if not all(tree.all_finite(leaf) for leaf in g.values()):
            _blame(f, params, batch)
            tree.check_finite(g, "Jᵀw")
        return g

    return product


def jvp(f: Function, microbatch: int | None = None) -> Callable[[Tree, Any, Tree], Tensor]:
    """Make v ↦ Jv: how f of every sequence changes along one direction, by forward mode and without J.

    (Jv)_x = ⟨∇f(x; θ), v⟩ = d/dε f(x; θ + εv)|₀

    Args:
        f: (params, batch) -> [n], or [n, ...] for quantities per token.
        microbatch: sequences under way at once; None takes the whole batch.

    Returns:
        (params, batch, direction) -> [n], or f's own shape; units of f.

    Raises:
        TreeError: (when called) direction and params disagree in names, shapes or dtypes.
        BatchError, ModelError, NonFiniteError: (when called) see `fkernel.func.boundary`.

    Example:
        >>> f = lambda params, x: (x @ params["w"]) ** 2
        >>> jvp(f)({"w": torch.tensor([1.0, 2.0])}, torch.eye(2), {"w": torch.tensor([0.5, 0.5])})
        tensor([1., 2.])
    """
    return _along(f, microbatch, first_derivative)


def curvature(f: Function, microbatch: int | None = None) -> Callable[[Tree, Any, Tree], Tensor]:
    """Make v ↦ vᵀH_x v: the second derivative of f of every sequence along one direction.

    vᵀH_x v = d²/dε² f(x; θ + εv)|₀. Half of it is the second-order term of a step: f(θ+v) = f + Jv + ½vᵀHv + O(|v|³).

    Arguments, returns and errors as in `jvp`.

    Example:
        >>> f = lambda params, x: (x @ params["w"]) ** 2
        >>> curvature(f)({"w": torch.tensor([1.0, 2.0])}, torch.eye(2), {"w": torch.tensor([0.5, 0.5])})
        tensor([0.5000, 0.5000])
    """
    return _along(f, microbatch, second_derivative)


def first_derivative(f: Callable[[Tree], Tensor], params: Tree, direction: Tree) -> tuple[Tensor, Tensor]:
    """f and its derivative along a direction."""
    value, tangent, *_ = func.jvp(f, (params,), (direction,))
    return value, tangent


def second_derivative(f: Callable[[Tree], Tensor], params: Tree, direction: Tree) -> tuple[Tensor, Tensor]:
    """f and its second derivative along a direction."""
    with elementary():
        (value, _), (_, second), *_ = func.jvp(lambda p: first_derivative(f, p, direction), (params,), (direction,))
    return value, second


def _along(f: Function, microbatch: int | None, derivative: Callable[..., Any]) -> Callable[..., Tensor]:
    def one_microbatch(params: Tree, batch: Any, direction: Tree) -> tuple[Tensor, Tensor]:
        def value_at(p: Tree) -> Tensor:
            value = bare(f)(p, batch)
            check_output(value, length(batch), per_sequence=False)
            return value

        # Not under no_grad: there some operations (silu) use a fused derivative that has no derivative of its own.
        value, out = derivative(value_at, params, direction)
        return value.detach(), out.detach()

    rows = stacked(one_microbatch, microbatch)

    def product(params: Tree, batch: Any, direction: Tree) -> Tensor:
        with boundary(f, params, batch):
            check_direction(direction, params)
            values, out = rows(params, batch, direction)
        check_values(values, name_of(f))
        check_values(out, f"the derivative of {name_of(f)}")
        return out

    return product


def _blame(f: Function, params: Tree, batch: Any) -> None:
    """Find the sequence whose gradient is not finite, one at a time; only ever run on the way to an error."""
    gradient = gradient_rows(f, None, plan_of(f, params, batch))
    for row in range(length(batch)):
        try:
            gradient(params, take(batch, slice(row, row + 1)))
        except NonFiniteError as error:
            raise error.at(row) from None
