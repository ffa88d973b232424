"""Certified derivatives along a direction: by forward or reverse mode, and compared with a step's effect."""

from __future__ import annotations

import warnings
from typing import Any

from fkernel.boundary import public
from fkernel.errors import FKernelError, ModelWarning
from fkernel.func.detach import through_detach
from fkernel.func.functional import Apply
from fkernel.func.inputs.batch import take, token_counts, trim
from fkernel.func.inputs.objective import Function, Objective, bare, name_of, own_width
from fkernel.func.inputs.validation import first_line
from fkernel.func.trust.checks import seen_of
from fkernel.func.trust.comparisons import (
    Values,
    derivative_against_difference,
    forward_against_reverse,
    shortest_few,
)
from fkernel.func.trust.directional import Order
from fkernel.func.trust.memory import Known, keep, known_of, note, runs
from fkernel.shapes import Tensor, Tree


def derivative_for(f: Function, params: Tree, batch: Any, direction: Tree, order: Order) -> Any:
    """Choose forward mode for a derivative along a direction, or reverse passes where that fails or differs."""
    # Correctness of forward rules depends on the model's operations: functions of one model share the result.
    model = f.apply if isinstance(f, Objective) and isinstance(f.apply, Apply) else f
    methods = known_of(model, params).derivatives
    if order.name not in methods:
        batch = seen_of(f, batch)
        methods[order.name] = _chosen(f, params, batch, direction, order, known_of(f, params, batch))
    return methods[order.name]


def _chosen(f: Function, params: Tree, batch: Any, direction: Tree, order: Order, known: Known) -> Any:
    counts = token_counts(batch)
    row = min(range(len(counts)), key=counts.__getitem__)
    one = trim(take(batch, slice(row, row + 1)))
    value_at = lambda p: bare(f)(p, one)  # noqa: E731

    def by_reverse(*given: Any) -> tuple[Tensor, Tensor]:
        value, derivative, _ = order.reverse(*given)
        return value, derivative

    try:
        forward = order.forward(value_at, params, direction)[1]
    except FKernelError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        if "called random operation" in str(error):
            raise
        try:
            order.reverse(value_at, params, direction)
        except (RuntimeError, NotImplementedError):
            raise error from None
        _said_slower(f, order, first_line(error))
        return by_reverse
    if not runs("forward"):
        return order.forward
    try:
        _, reverse, size = order.reverse(value_at, params, direction)
    except (RuntimeError, NotImplementedError):
        return order.forward  # without a second backward rule there is nothing to compare with
    certificate = forward_against_reverse(forward, reverse, size, order)
    if certificate.passed is False:
        why = "an operation's forward rule is wrong, or f holds in backward alone what torch.no_grad surrounds"
        _said_slower(f, order, f"{certificate.detail}; {why}")
        return by_reverse
    keep(known, certificate)
    return order.forward


def _said_slower(f: Function, order: Order, why: str) -> None:
    what = f"The {order.name} of {name_of(f)} is taken by reverse passes, which is slower: {why}."
    warnings.warn(what, ModelWarning, stacklevel=2)


@public
def true_derivative(f: Function, params: Tree, batch: Any, step: Tree, values: Values | None = None) -> Function:
    """Certify that f's derivative matches a step's effect; else differentiate through what f detaches.

    The optimizer uses f's own backward pass on U, whatever it holds constant; a step's effect on E is the whole
    derivative. Where neither matches, there is a warning.

    Args:
        f: (params, batch) -> [n].
        params: θ.
        batch: E.
        step: Δθ.
        values: another way to evaluate f along the step, (f, some of E, scales) -> f at θ + s Δθ for each s; by default
            whole, one s after the other.

    Returns:
        f, or `through_detach(f)`: the one whose derivative matches central differences along the step.

    Example:
        >>> import torch
        >>> f = lambda params, x: (x @ params["w"]).sin()
        >>> v = {"w": torch.ones(2)}
        >>> true_derivative(f, v, torch.eye(2), v) is f
        True
    """
    if not runs("derivative"):
        return f
    seen = seen_of(f, batch)
    few = shortest_few(seen, token_counts(seen), own_width(f))
    certificate = derivative_against_difference(f, params, few, step, values)
    if certificate.passed is not False:
        note(f, params, batch, certificate)
        return f
    derivative = through_detach(f)
    repaired = derivative_against_difference(derivative, params, few, step, values)
    note(
        f,
        params,
        batch,
        repaired._replace(detail=f"{repaired.detail}; {certificate.error:.1e} without looking through detach"),
    )
    if repaired.passed:
        warnings.warn(
            f"{name_of(f)} holds something constant in its backward pass (detach, torch.no_grad): along the step it "
            f"moves otherwise than that says ({certificate.error:.1%} apart). U's gradients are taken as training "
            f"takes them, E's derivative through what is held constant ({repaired.error:.1%} apart).",
            ModelWarning,
            stacklevel=2,
        )
        return derivative
    warnings.warn(
        f"Along the step {name_of(f)} moves otherwise than its derivative says ({certificate.detail}): a custom "
        f"autograd.Function, a straight-through estimator, or a step too large for differences? Contributions to E "
        f"follow the backward pass, and not what happens.",
        ModelWarning,
        stacklevel=2,
    )
    return f
