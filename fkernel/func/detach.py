"""Derivatives through what a model detaches in its forward pass.

With c(θ) = h(θ).detach() in f(θ) = F(θ, c(θ)),

    backward()     ∂F/∂θ                      what an optimizer receives, and forward mode too
    derivative     ∂F/∂θ + ∂F/∂c ∂h/∂θ        the change of f under a step

DoRA's weight norm and DeepSeek's routing bias are such constants. The optimizer uses the first for U; the effect of a
step on E is the second.

Differentiated through: `Tensor.detach`, `Tensor.data`, `torch.no_grad` and `torch.set_grad_enabled(False)`. A custom
backward rule (`torch.autograd.Function`) is unchanged.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fkernel.boundary import described, public
from fkernel.errors import ArgumentError
from fkernel.func.constants import seen_through
from fkernel.func.functional import Apply
from fkernel.func.inputs.objective import Objective


@public
def through_detach(f: Any) -> Any:
    """Return the same function, differentiated through everything that it detaches.

    Args:
        f: (params, batch) -> [n] or [n, ...]; or an `Apply`.

    Returns:
        A function of the same values; use it for E, and f itself for U.

    Example:
        >>> import torch
        >>> from fkernel.func import jvp
        >>> f = lambda params, x: (x @ params["w"]) * (x @ params["w"]).detach()
        >>> w, v = {"w": torch.tensor([3.0])}, {"w": torch.tensor([1.0])}
        >>> jvp(f)(w, torch.ones(1, 1), v), jvp(through_detach(f))(w, torch.ones(1, 1), v)  # of w²
        (tensor([3.]), tensor([6.]))
    """
    if not callable(f):
        raise ArgumentError(f"f is {described(f)}; expected a function (params, batch) -> [n], or an Apply.")
    if isinstance(f, Apply):
        return replace(f, through_detach=True)

    def whole(params: Any, batch: Any) -> Any:
        with seen_through():
            return (f.fn if isinstance(f, Objective) else f)(params, batch)

    if not isinstance(f, Objective):
        return whole
    return replace(f, fn=whole, apply=through_detach(f.apply) if isinstance(f.apply, Apply) else f.apply)
