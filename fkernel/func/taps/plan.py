"""A forward pass over a batch with tapped parameters, and its reverse pass.

The autograd graph is searched for paths from the values to a parameter other than through taps; and every tap that the
values depend on must receive a cotangent.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fkernel.errors import ModelError, listing
from fkernel.func.taps.uses import LayerCall
from fkernel.shapes import Tensor, Tree


class GradientPlan(NamedTuple):
    """How the gradients of a function are computed; by default by vmap over a reverse pass.

    Attributes:
        loose: (parameter, function) of uses that carry no gradient, such as `weight.detach()`.
        looped: whether sequences are differentiated one at a time, since vmap cannot transform f.
        batched: whether one plain pass over all sequences gives every gradient; see `fkernel.func.taps.batched`.
    """

    loose: frozenset[tuple[str, str]] = frozenset()
    looped: bool = False
    batched: bool = False


class Pass(NamedTuple):
    """A forward pass over a microbatch, with its graph and taps.

    Attributes:
        values: of n sequences.
        traced: {name: leaf} whose gradients the reverse pass returns.
        zeros: [n], traced; the graph of taps on tensors without one.
        uses: of parameters, in order.
        loose: (parameter, function) of their other uses.
    """

    values: Tensor
    traced: Tree
    zeros: Tensor
    uses: list[LayerCall]
    loose: set[tuple[str, str]]


def backward(tape: Pass) -> Tree:
    """Run the reverse pass: every tap records its cotangent; return the gradients of `traced`."""
    with torch.enable_grad():
        # The zeros give the sum a graph where f has none.
        total = tape.values.sum() + tape.zeros.sum()
    leaves = [*tape.traced.values()]
    *grads, _ = torch.autograd.grad(total, [*leaves, tape.zeros], allow_unused=True)
    _check_cotangents(tape)
    return {
        name: leaf.detach().new_zeros(()).expand(leaf.shape) if g is None else g
        for (name, leaf), g in zip(tape.traced.items(), grads, strict=True)
    }


def _check_cotangents(tape: Pass) -> None:
    """Raise ModelError where a tap that the values depend on received no cotangent."""
    if all(use.cotangent is not None for use in tape.uses):
        return
    tapped = (use for node in _nodes(tape.values) for use in getattr(node, "uses", ()))
    if lost := [use.parameter for use in tapped if isinstance(use, LayerCall) and use.cotangent is None]:
        raise ModelError(
            f"No cotangent came back to the layer of {listing(lost)}, though f depends on it: its gradient cannot be "
            f"captured. Please report the model that does so."
        )


def explained(tape: Pass) -> frozenset[str]:
    """Find the traced parameters without a path from the values: taps have all of their gradient."""
    reached = {id(leaf) for node in _nodes(tape.values) if (leaf := getattr(node, "variable", None)) is not None}
    return frozenset(name for name, leaf in tape.traced.items() if id(leaf) not in reached)


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
