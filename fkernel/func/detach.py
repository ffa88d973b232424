"""The derivative of what a model holds constant in its backward pass.

With c(θ) = h(θ).detach() in f(θ) = F(θ, c(θ)),

    backward()     ∂F/∂θ                      what an optimizer is given, and forward mode too
    derivative     ∂F/∂θ + ∂F/∂c ∂h/∂θ        what a step does to f

DoRA's weight norm and DeepSeek's routing bias are such constants. A sequence of U gave the optimizer the first; what a
step does to a sequence of E is told by the second.

Seen through: `Tensor.detach`, `Tensor.data`, `torch.no_grad` and `torch.set_grad_enabled(False)`. A backward rule that
somebody wrote (`torch.autograd.Function`) is what it is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fkernel.func.constants import seen_through
from fkernel.func.functional import Apply
from fkernel.func.inputs.objective import Objective


def through_detach(f: Any) -> Any:
    """Make the same function with its whole derivative: nothing that it detaches is held constant.

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
    if isinstance(f, Apply):
        return replace(f, through_detach=True)

    def whole(params: Any, batch: Any) -> Any:
        with seen_through():
            return (f.fn if isinstance(f, Objective) else f)(params, batch)

    if not isinstance(f, Objective):
        return whole
    return replace(f, fn=whole, apply=through_detach(f.apply) if isinstance(f.apply, Apply) else f.apply)
