"""Derivatives of f of every sequence along one direction: by forward mode, reverse passes, or from handles.

    forward    Jv = d/dε f(θ + εv)|₀                          vᵀHv = d²/dε² f(θ + εv)|₀, forward over forward
    reverse    h(w) = ⟨Jᵀw, v⟩,  Jv = ∂h/∂w                    k(w) = ⟨∇_θ h(w), v⟩,  vᵀH_n v = ∂k/∂w_n
    handles    (Jv)_n = ⟨g_n, v⟩;  for factors g_n = Σ_t δ_nt a_ntᵀ it is Σ_t ⟨δ_nt, V a_nt⟩, without forming g_n

h and k are linear in w, so their derivatives are the same at any w. The reverse form keeps the graphs of two and of
three passes; it needs backward rules only, and certifies the forward form. Handles take one reverse pass, and V a costs
another forward pass: three in all, as many as forward mode.

Source: the "double backward" trick, J. Townsend, "A new trick for calculating Jacobian vector products" (2017).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import func

from fkernel.distributed import ShardedTree
from fkernel.func.handles.forms import Concat, Factored, Handle, Handles, SparseRows, Sum, count, tensors
from fkernel.func.handles.products import Products, ProductSpec, RowSpec
from fkernel.func.inputs.batch import length
from fkernel.func.inputs.leaves import leaves_of
from fkernel.func.inputs.objective import Function, bare
from fkernel.func.inputs.validation import check_output
from fkernel.func.trust.primitives import elementary
from fkernel.shapes import Tensor, Tree


class Order(NamedTuple):
    """A derivative in both forms.

    Attributes:
        name: in messages.
        forward: by forward mode.
        reverse: by reverse passes.
        bound: largest difference of the two, relative to Σ_α |g_α v_α|.
    """

    name: str
    forward: Callable[[Callable[[Tree], Tensor], Tree, Tree], tuple[Tensor, Tensor]]
    reverse: Callable[[Callable[[Tree], Tensor], Tree, Tree], Any]
    bound: float


def value_on(f: Function, batch: Any) -> Callable[[Tree], Tensor]:
    """Return θ ↦ f(θ, batch), [n] or [n, ...]."""

    def value_at(params: Tree) -> Tensor:
        value = bare(f)(params, batch)
        check_output(value, length(batch), per_sequence=False)
        return value

    return value_at


def first_derivative(f: Callable[[Tree], Tensor], params: Tree, direction: Tree) -> tuple[Tensor, Tensor]:
    """Return f and its derivative along a direction."""
    value, tangent, *_ = func.jvp(f, (params,), (direction,))
    return value, tangent


def second_derivative(f: Callable[[Tree], Tensor], params: Tree, direction: Tree) -> tuple[Tensor, Tensor]:
    """Return f and its second derivative along a direction."""
    with elementary():
        (value, _), (_, second), *_ = func.jvp(lambda p: first_derivative(f, p, direction), (params,), (direction,))
    return value, second


class ByReverse(NamedTuple):
    """A derivative along v, without forward mode.

    Attributes:
        value: f(θ).
        derivative: Jv, or vᵀHv, of f's shape.
        size: Σ_α |g_α v_α|, the scale of its rounding.
    """

    value: Tensor
    derivative: Tensor
    size: float


def first_by_reverse(f: Callable[[Tree], Tensor], params: Tree, direction: Tree) -> ByReverse:
    """Return f and its derivative along a direction, without forward mode."""
    value, weights, along, _ = _weighted_derivative(f, params, direction)
    return ByReverse(value, _slope(along.total, weights), along.size)


def second_by_reverse(f: Callable[[Tree], Tensor], params: Tree, direction: Tree) -> ByReverse:
    """Return f and its second derivative along a direction, without forward mode."""
    value, weights, along, leaves = _weighted_derivative(f, params, direction)
    if not along.total.requires_grad:
        return ByReverse(value, torch.zeros_like(value), 0.0)
    twice = torch.autograd.grad(along.total, [*leaves.values()], create_graph=True, allow_unused=True)
    bent = _inner(twice, direction)
    return ByReverse(value, _slope(bent.total, weights), bent.size)


def _weighted_derivative(
    f: Callable[[Tree], Tensor], params: Tree, direction: Tree
) -> tuple[Tensor, Tensor, Inner, Tree]:
    """Return f(θ), w = 1, h(w) = ⟨Jᵀw, v⟩ with its graph, and its leaves θ."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
    with torch.enable_grad():
        value = f(leaves)
        weights = torch.ones_like(value).requires_grad_()
        if not value.requires_grad:
            return value, weights, Inner(torch.zeros(()), 0.0), leaves
        grads = torch.autograd.grad(value, [*leaves.values()], weights, create_graph=True, allow_unused=True)
        return value.detach(), weights, _inner(grads, direction), leaves


class Inner(NamedTuple):
    """⟨g, v⟩ with its graph, and Σ |g v|."""

    total: Tensor
    size: float


def _inner(grads: tuple[Tensor | None, ...], direction: Tree) -> Inner:
    with torch.enable_grad():
        parts = [g * v for g, v in zip(grads, direction.values(), strict=True) if g is not None]
        total = torch.stack([part.sum() for part in parts]).sum() if parts else torch.zeros(())
    return Inner(total, sum(float(part.detach().abs().sum()) for part in parts))


def _slope(along: Tensor, weights: Tensor) -> Tensor:
    if not along.requires_grad:
        return torch.zeros_like(weights)
    (slope,) = torch.autograd.grad(along, weights, allow_unused=True)
    return torch.zeros_like(weights) if slope is None else slope


def row_by_row(f: Callable[[Tree], Tensor], params: Tree, direction: Tree) -> tuple[Tensor, Tensor]:
    """Return f [n] and ⟨∇f_n, v⟩, by a reverse pass for each sequence.

    Args:
        f: params -> [n].
        params: θ.
        direction: v.

    Example:
        >>> row_by_row(lambda p: p["w"] ** 2, {"w": torch.tensor([3.0])}, {"w": torch.tensor([0.5])})
        (tensor([9.]), tensor([3.], dtype=torch.float64))
    """
    leaves, slopes = leaves_of(params), list[float]()
    with torch.enable_grad():
        value = leaves.run(f, {**leaves.constants, **leaves.trained})
    check_output(value, len(value), per_sequence=True)

    def arrived(leaf: Tensor, name: str) -> None:
        assert leaf.grad is not None
        g, v = params.part(leaf.grad) if isinstance(params, ShardedTree) else leaf.grad, direction[name]
        slopes[-1] += float((g * v).sum(dtype=torch.float64))
        leaf.grad = None  # one parameter's gradient is there at a time

    for name, leaf in leaves.trained.items():
        leaf.register_post_accumulate_grad_hook(partial(arrived, name=name))
    for one in value:
        slopes.append(0.0)
        if one.requires_grad:
            torch.autograd.backward(one, retain_graph=True, inputs=[*leaves.trained.values()])
    every = torch.tensor(slopes, dtype=torch.float64, device=value.device)
    return value.detach(), params.summed(every) if isinstance(params, ShardedTree) else every


def along_direction(handles: Handles, direction: Tree) -> Tensor:
    """Compute ⟨g_n, v⟩ from handles, [n] float64; factors and lookups are not multiplied out.

    Args:
        handles: {name: handle} of n sequences.
        direction: v, {name: [*shape]}.

    Example:
        >>> J = {"w": Factored(torch.tensor([[[1.0, 2.0]], [[0.0, 1.0]]]), torch.tensor([[[10.0]], [[1.0]]]))}
        >>> along_direction(J, {"w": torch.tensor([[3.0, 1.0]])})
        tensor([50.,  1.], dtype=torch.float64)
    """
    return torch.stack([_sums(handle, direction[name]) for name, handle in handles.items()]).sum(0)


def _sums(handle: Handle, v: Tensor) -> Tensor:
    match handle:
        case Concat(parts):
            return torch.cat([_sums(part, v) for part in parts])
        case Sum(parts):
            return torch.stack([_sums(part, v) for part in parts]).sum(0)
        case Factored(inputs, cotangents):
            return (inputs @ v.to(inputs).mT).mul_(cotangents).sum(2).sum(1, dtype=torch.float64)
        case SparseRows(ids, cotangents, _):
            return v.to(cotangents)[ids].mul_(cotangents).flatten(2).sum(2).sum(1, dtype=torch.float64)
        case _:
            products = Products(ProductSpec(x=RowSpec({"": {"": v}})), count(handle), 0, tensors(handle)[0].device)
            products.add({"": handle}, {"": handle}, own_y=False)
            return products.whole("x", "")


FIRST = Order("derivative along a direction", first_derivative, first_by_reverse, 3e-5)
SECOND = Order("second derivative along a direction", second_derivative, second_by_reverse, 3e-4)
