"""Which parameters a function never uses: training gives them no gradient, and its optimizer leaves them alone.

    torch      p.grad is None: no momentum, no decay            where no path of the graph leads to p
               p.grad is 0: momentum and decay move it          where one does, such as an expert that no token chose

A vjp of `torch.func` has zeros in both cases, so that the difference must be asked of a plain reverse pass.
"""

from __future__ import annotations

from typing import Any

import torch

from fkernel.func.inputs.batch import take, trim
from fkernel.func.inputs.objective import Function, bare
from fkernel.func.inputs.validation import validated
from fkernel.func.trust.checks import seen_of
from fkernel.shapes import Tree


def unused_parameters(f: Function, params: Tree, batch: Any) -> frozenset[str]:
    """Find the parameters that f never uses, by one plain reverse pass over the first sequence.

    What f executes is the same for every sequence, so one tells for all.

    Args:
        f: (params, batch) -> [n].
        params: θ, {name: [*shape]}.
        batch: what f takes.

    Returns:
        The names whose gradient torch has None for. In a step they are `None` among the gradients that
        `fkernel.precond.adamw_step` is given.

    Raises:
        As `fkernel.func.vjp`.

    Example:
        >>> f = lambda params, x: x @ params["w"]
        >>> unused_parameters(f, {"w": torch.zeros(2), "other": torch.zeros(3)}, torch.eye(2))
        frozenset({'other'})
    """
    with validated(f, params, batch):
        copies = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
        with torch.enable_grad():
            value = bare(f)(copies, trim(take(seen_of(f, batch), slice(0, 1)))).sum()
        if not value.requires_grad:
            return frozenset(params)
        found = torch.autograd.grad(value, [*copies.values()], allow_unused=True)
    return frozenset(name for name, g in zip(copies, found, strict=True) if g is None)
