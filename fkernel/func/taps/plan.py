"""One pass over a batch whose parameters' uses are listened to: what it leaves behind, and how it goes back.

Which parameters are explained by the uses that were heard is not assumed: autograd is asked whether a path from the
value to them remains. And a use that the value depends on has to hear something.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fkernel.errors import ModelError, listing
from fkernel.func.taps.uses import LayerCall
from fkernel.shapes import Tensor, Tree


class GradientPlan(NamedTuple):
    """How the gradients of a function are taken; by vmap over a reverse pass, unless it says otherwise.

    Attributes:
        loose: (parameter, function) of uses that carry no gradient, such as `weight.detach()`.
        looped: whether vmap cannot follow f, so that sequences are differentiated one at a time.
        batched: whether one plain pass over all sequences gives every gradient; see `fkernel.func.taps.batched`.
    """

    loose: frozenset[tuple[str, str]] = frozenset()
    looped: bool = False
    batched: bool = False


class Pass(NamedTuple):
    """One forward pass over a microbatch, ready for the reverse one.

    Attributes:
        values: of n sequences.
        traced: {name: leaf} whose gradients are asked for by themselves.
        zeros: [n], traced; what is listened to before it has a graph stands in theirs.
        uses: of parameters, in order.
        loose: (parameter, function) of their other uses.
    """

    values: Tensor
    traced: Tree
    zeros: Tensor
    uses: list[LayerCall]
    loose: set[tuple[str, str]]


def backward(found: Pass) -> Tree:
    """Run the reverse pass: every use hears its cotangent, and gradients of what was traced return."""
    with torch.enable_grad():
        # The zeros give the sum a graph even where f has none.
        total = found.values.sum() + found.zeros.sum()
    leaves = [*found.traced.values()]
    *grads, _ = torch.autograd.grad(total, [*leaves, found.zeros], allow_unused=True)
    _check_heard(found)
    return {
        name: leaf.detach().new_zeros(()).expand(leaf.shape) if g is None else g
        for (name, leaf), g in zip(found.traced.items(), grads, strict=True)
    }


def _check_heard(found: Pass) -> None:
    """Raise ModelError where a layer that the value depends on heard no cotangent: its gradient is not zero then."""
    if all(use.cotangent is not None for use in found.uses):
        return
    heard = (use for node in _nodes(found.values) for use in getattr(node, "uses", ()))
    if lost := [use.parameter for use in heard if isinstance(use, LayerCall) and use.cotangent is None]:
        raise ModelError(
            f"No cotangent came back to the layer of {listing(lost)}, though f depends on it: its gradient cannot be "
            f"captured. Please report the model that does so."
        )


def explained(found: Pass) -> frozenset[str]:
    """Find the traced parameters that no path from the values leads to: their known uses are all that there is."""
    reached = {id(leaf) for node in _nodes(found.values) if (leaf := getattr(node, "variable", None)) is not None}
    return frozenset(name for name, leaf in found.traced.items() if id(leaf) not in reached)


def _nodes(value: Tensor) -> set[Any]:
    """Find the nodes of a value's graph."""
    seen: set[Any] = set()
    todo = [value.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo.extend(parent for parent, _ in node.next_functions)
    return seen
