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

from collections.abc import Callable
from typing import Any

import torch
from torch import func
from torch.utils import _pytree as pytree

from fkernel import tree
from fkernel.errors import NonFiniteError
from fkernel.func.batch import length, take
from fkernel.func.boundary import boundary, check_direction, check_output, check_rows, check_weights
from fkernel.func.elementary import elementary
from fkernel.func.microbatch import stacked, summed
from fkernel.func.objective import Function, bare, check_values, name_of
from fkernel.shapes import Shaped, Tensor, Tree


def per_sequence_grad(f: Function, microbatch: int | None = None) -> Callable[[Tree, Any], Tree]:
    """Make J: the gradient of every sequence by itself.

    J[x] = ∇_θ f(x; θ)

    Args:
        f: (params, batch) -> [n].
        microbatch: sequences under way at once; None takes the whole batch.

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
    rows = gradient_rows(f, microbatch)

    def gradient(params: Tree, batch: Any) -> Tree:
        with boundary(f, params, batch):
            return rows(params, batch)

    return gradient


def gradient_rows(f: Function, microbatch: int | None) -> Callable[[Tree, Any], Tree]:
    """J without the checks of its inputs, for callers that have made them; values and gradients are still checked."""
    one = _gradient_of_one(bare(f))

    def all_at_once(params: Tree, batch: Any) -> tuple[Tree, Tensor]:
        rows = pytree.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, batch)
        return func.vmap(one, in_dims=(None, rows), randomness="error")(params, batch)

    def checked(params: Tree, batch: Any) -> Tree:
        J, values = stacked(all_at_once, microbatch)(params, batch)
        check_values(values, name_of(f))
        check_rows(J)
        return J

    return checked


def _gradient_of_one(f: Function) -> Callable[[Tree, Any], tuple[Tree, Tensor]]:
    """∇f and f of a single sequence, which f sees as a batch of one: models want their leading dimension."""

    def one(params: Tree, x: Any) -> tuple[Tree, Tensor]:
        batch = pytree.tree_map(lambda leaf: leaf[None] if isinstance(leaf, Tensor) else leaf, x)
        value, pull = _vjp(f, params, batch, 1)
        # func.grad would record the backward pass for a third derivative that nobody asks for, and hold its memory.
        with torch.no_grad():
            return pull(torch.ones_like(value))[0], value[0]

    return one


def _vjp(f: Function, params: Tree, batch: Any, n: int) -> tuple[Tensor, Callable[[Tensor], tuple[Tree]]]:
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

    def pull_back(params: Tree, batch: Any, weights: Tensor) -> tuple[Tree, Tensor]:
        value, pull = _vjp(bare(f), params, batch, length(batch))
        with torch.no_grad():
            return pull(weights.to(value.dtype))[0], value

    total = summed(pull_back, microbatch)

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
    return _along(f, microbatch, _first_derivative)


def curvature(f: Function, microbatch: int | None = None) -> Callable[[Tree, Any, Tree], Tensor]:
    """Make v ↦ vᵀH_x v: the second derivative of f of every sequence along one direction.

    vᵀH_x v = d²/dε² f(x; θ + εv)|₀. Half of it is the second-order term of a step: f(θ+v) = f + Jv + ½vᵀHv + O(|v|³).

    Arguments, returns and errors as in `jvp`.

    Example:
        >>> f = lambda params, x: (x @ params["w"]) ** 2
        >>> curvature(f)({"w": torch.tensor([1.0, 2.0])}, torch.eye(2), {"w": torch.tensor([0.5, 0.5])})
        tensor([0.5000, 0.5000])
    """
    return _along(f, microbatch, _second_derivative)


def _first_derivative(f: Callable[[Tree], Tensor], params: Tree, direction: Tree) -> tuple[Tensor, Tensor]:
    """f and its derivative along a direction."""
    value, tangent, *_ = func.jvp(f, (params,), (direction,))
    return value, tangent


def _second_derivative(f: Callable[[Tree], Tensor], params: Tree, direction: Tree) -> tuple[Tensor, Tensor]:
    """f and its second derivative along a direction."""
    with elementary():
        (value, _), (_, second), *_ = func.jvp(lambda p: _first_derivative(f, p, direction), (params,), (direction,))
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
    gradient = gradient_rows(f, None)
    for row in range(length(batch)):
        try:
            gradient(params, take(batch, slice(row, row + 1)))
        except NonFiniteError as error:
            raise error.at(row) from None
