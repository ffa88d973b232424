"""Parameters that a function never uses: they have no gradient, and torch's optimizers skip them.

    torch      p.grad is None: no momentum, no decay            where p is not in the graph
               p.grad is 0: momentum and decay move it          where it is, such as an expert that no token chose

A vjp of `torch.func` returns zeros in both cases, so a plain reverse pass is needed to distinguish them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from fkernel.boundary import public
from fkernel.func.inputs.batch import take, trim
from fkernel.func.inputs.leaves import leaves_of
from fkernel.func.inputs.objective import Function, bare
from fkernel.func.inputs.validation import validated
from fkernel.func.trust.checks import seen_of
from fkernel.shapes import Tensor, Tree


@public
def unused_parameters(f: Function, params: Tree, batch: Any) -> frozenset[str]:
    """Find the parameters that f never uses, by one plain reverse pass over the first sequence.

    f executes the same operations for every sequence, so one is enough.

    Args:
        f: (params, batch) -> [n].
        params: θ, {name: [*shape]}.
        batch: f's second argument.

    Returns:
        The names whose gradient is None in torch. In a step they are `None` among the gradients that
        `fkernel.precond.adamw_step` is given.

    Raises:
        As `fkernel.func.vjp`.

    Example:
        >>> f = lambda params, x: x @ params["w"]
        >>> unused_parameters(f, {"w": torch.zeros(2), "other": torch.zeros(3)}, torch.eye(2))
        frozenset({'other'})
    """
    with validated(f, params, batch):
        leaves, used = leaves_of(params), set[str]()
        with torch.enable_grad():
            value = leaves.value(bare(f), trim(take(seen_of(f, batch), slice(0, 1)))).sum()
        if not value.requires_grad:
            return frozenset(params)

        def arrived(leaf: Tensor, name: str) -> None:
            used.add(name)
            leaf.grad = None  # one parameter's gradient is there at a time

        for name, leaf in leaves.trained.items():
            leaf.register_post_accumulate_grad_hook(partial(arrived, name=name))
        torch.autograd.backward(value, inputs=[*leaves.trained.values()])
    return frozenset(params) - used
