"""The derivatives of a differentiable f(params, batch) -> [n]: J, Jᵀw, Jv and vᵀHv.

J stacks the gradients of f, one row a sequence: J[x, α] = ∂f(x; θ)/∂θ_α. Then

    per_sequence_grad   J                  vmap over sequences of a reverse pass
    vjp                 Jᵀw = Σ_x w_x ∇f(x)  one reverse pass over the batch
    jvp                 Jv  = d/dε f(x; θ + εv)|₀        one forward-mode pass, about two evaluations
    curvature           vᵀH_x v = d²/dε² f(x; θ + εv)|₀  forward over forward

Where torch.func cannot transform f, J is computed one sequence at a time, and Jv and vᵀHv by reverse passes alone
(`fkernel.func.trust.directional`): as exact but slower, with a warning.

Every function here takes f and returns a function of (params, batch, …); `microbatch` limits the sequences in one pass
and changes no value. Results carry no graph. For higher derivatives compose `torch.func` yourself, as `curvature` does.

Source: J. Bradbury et al., JAX autodiff cookbook (vmap, jvp, vjp); B. Pearlmutter, "Fast exact multiplication by the
Hessian" (1994), for forward-mode second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fkernel import tree
from fkernel.boundary import public
from fkernel.errors import NonFiniteError
from fkernel.func.handles.forms import Handles, stack_handles
from fkernel.func.inputs.batch import length, take
from fkernel.func.inputs.microbatch import groups, stacked, summed, token_grant
from fkernel.func.inputs.objective import Function, bare, check_values, name_of, own_width
from fkernel.func.inputs.validation import check_direction, check_weights
from fkernel.func.taps.rows import gradient_rows, handle_pieces, pull_back
from fkernel.func.trust.along import derivative_for
from fkernel.func.trust.checks import certified, plan_of
from fkernel.func.trust.directional import FIRST, SECOND, Order, value_on
from fkernel.shapes import Shaped, Tensor, Tree


@public
def per_sequence_grad(f: Function, microbatch: int | None = None) -> Callable[[Tree, Any], Tree]:
    """Return J: the gradient of every sequence.

    J[x] = ∇_θ f(x; θ)

    Args:
        f: (params, batch) -> [n].
        microbatch: sequences of the greatest length in one pass, and as many tokens of shorter ones; None takes the
            whole batch.

    Returns:
        (params, batch) -> {name: [n, *shape]}, in the parameters' dtype; units of f per unit of parameter.

    Raises:
        BatchError, TreeError, ModelError, NonFiniteError: (when called) see `fkernel.func.inputs.validation`; a
            non-finite gradient names the sequence and the parameter.

    Example:
        >>> import torch
        >>> f = lambda params, x: (x @ params["w"]) ** 2
        >>> per_sequence_grad(f)({"w": torch.tensor([1.0, 2.0])}, torch.eye(2))
        {'w': tensor([[2., 0.],
                      [0., 4.]])}
    """

    @public
    def gradient(params: Tree, batch: Any) -> Tree:
        with certified(f, params, batch):
            return gradient_rows(f, microbatch, plan_of(f, params, batch))(params, batch)

    return gradient


@public
def per_sequence_handles(f: Function, microbatch: int | None = None) -> Callable[[Tree, Any], Handles]:
    """Return J in its smallest exact form: factors of linear layers, rows of tables, dense where that is smallest.

    Arguments and errors as in `per_sequence_grad`; `fkernel.func.handles.forms.materialize_into` writes J out.

    Returns:
        (params, batch) -> {name: handle}; see `fkernel.func.handles.forms`. `contract` takes any mix of them.

    Example:
        >>> import torch
        >>> f = lambda params, x: torch.nn.functional.linear(x, params["w"]).square().sum((1, 2))
        >>> J = per_sequence_handles(f)({"w": torch.ones(8, 8)}, torch.ones(3, 2, 8))
        >>> type(J["w"]).__name__, list(J["w"].inputs.shape)
        ('Factored', [3, 2, 8])
    """

    @public
    def handles(params: Tree, batch: Any) -> Handles:
        with certified(f, params, batch):
            pieces = groups(batch, token_grant(batch, microbatch), own_width(f))
            plan = plan_of(f, params, batch)
            return stack_handles(handle_pieces(f, params, batch, pieces, plan))

    return handles


@public
def vjp(f: Function, microbatch: int | None = None) -> Callable[[Tree, Any, Tensor], Tree]:
    """Return w ↦ Jᵀw: the weighted sum of all gradients, by one reverse pass and without J.

    Jᵀw = Σ_x w_x ∇f(x; θ)

    Args:
        f: (params, batch) -> [n].
        microbatch: sequences in one pass; None takes the whole batch.

    Returns:
        (params, batch, weights [n]) -> {name: [*shape]}.

    Raises:
        BatchError, TreeError, ModelError, NonFiniteError: (when called) see `fkernel.func.inputs.validation`; where the
            sum is not finite, the error names the sequence and parameter that cause it.

    Example:
        >>> import torch
        >>> f = lambda params, x: (x @ params["w"]) ** 2
        >>> vjp(f)({"w": torch.tensor([1.0, 2.0])}, torch.eye(2), torch.tensor([1.0, -1.0]))
        {'w': tensor([ 2., -4.])}
    """

    def one_microbatch(params: Tree, batch: Any, weights: Tensor) -> tuple[Tree, Tensor]:
        value, pull = pull_back(bare(f), params, batch, length(batch))
        return pull(weights.to(value.dtype)), value

    total = summed(one_microbatch, microbatch, own_width(f))

    @public
    def product(params: Tree, batch: Any, weights: Shaped[Tensor, " n"]) -> Tree:
        with certified(f, params, batch):
            check_weights(weights, length(batch))
            g, values = total(params, batch, weights)
        check_values(values, name_of(f))
        if not all(tree.all_finite(leaf) for leaf in g.values()):
            _blame(f, params, batch)
            tree.check_finite(g, "Jᵀw")
        return g

    return product


@public
def jvp(f: Function, microbatch: int | None = None) -> Callable[[Tree, Any, Tree], Tensor]:
    """Return v ↦ Jv: the derivative of f of every sequence along one direction, by forward mode and without J.

    (Jv)_x = ⟨∇f(x; θ), v⟩ = d/dε f(x; θ + εv)|₀

    Args:
        f: (params, batch) -> [n], or [n, ...] for quantities per token.
        microbatch: sequences in one pass; None takes the whole batch.

    Returns:
        (params, batch, direction) -> [n], or f's own shape; units of f.

    Raises:
        TreeError: (when called) direction and params disagree in names, shapes or dtypes.
        BatchError, ModelError, NonFiniteError: (when called) see `fkernel.func.inputs.validation`.

    Example:
        >>> import torch
        >>> f = lambda params, x: (x @ params["w"]) ** 2
        >>> jvp(f)({"w": torch.tensor([1.0, 2.0])}, torch.eye(2), {"w": torch.tensor([0.5, 0.5])})
        tensor([1., 2.])
    """
    return _along(f, microbatch, FIRST)


@public
def curvature(f: Function, microbatch: int | None = None) -> Callable[[Tree, Any, Tree], Tensor]:
    """Return v ↦ vᵀH_x v: the second derivative of f of every sequence along one direction.

    vᵀH_x v = d²/dε² f(x; θ + εv)|₀. Half of it is the second-order term of a step: f(θ+v) = f + Jv + ½vᵀHv + O(|v|³).

    Arguments, returns and errors as in `jvp`.

    Example:
        >>> import torch
        >>> f = lambda params, x: (x @ params["w"]) ** 2
        >>> curvature(f)({"w": torch.tensor([1.0, 2.0])}, torch.eye(2), {"w": torch.tensor([0.5, 0.5])})
        tensor([0.5000, 0.5000])
    """
    return _along(f, microbatch, SECOND)


def _along(f: Function, microbatch: int | None, order: Order) -> Callable[..., Tensor]:
    @public
    def product(params: Tree, batch: Any, direction: Tree) -> Tensor:
        def one_microbatch(params: Tree, batch: Any, direction: Tree) -> tuple[Tensor, Tensor]:
            # Not under no_grad, where some operations (silu) use a fused derivative that is not differentiable.
            value, out = derivative(value_on(f, batch), params, direction)
            return value.detach(), out.detach()

        with certified(f, params, batch):
            check_direction(direction, params)
            derivative = derivative_for(f, params, batch, direction, order)
            values, out = stacked(one_microbatch, microbatch, own_width(f))(params, batch, direction)
        check_values(values, name_of(f))
        check_values(out, f"the derivative of {name_of(f)}")
        return out

    return product


def _blame(f: Function, params: Tree, batch: Any) -> None:
    """Raise NonFiniteError for the first sequence with a non-finite gradient; called only on errors."""
    gradient = gradient_rows(f, None, plan_of(f, params, batch))
    for row in range(length(batch)):
        try:
            gradient(params, take(batch, slice(row, row + 1)))
        except NonFiniteError as error:
            raise error.at(row) from None
