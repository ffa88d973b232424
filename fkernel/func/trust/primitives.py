"""Normalizations written out in elementary operations, for second derivatives.

torch's fused layer_norm and batch_norm treat mean and 1/σ as constants in their forward-mode rule. A jvp is correct; a
jvp of a jvp silently lacks the terms through mean and σ (pytorch issues 196700 and 196699: on a small GPT-2 the
curvature was 51 % off). Under `elementary()` layer_norm is composed of mean, square and root, whose rules are correct
at any order, and other normalizations over batch statistics are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fkernel.errors import ModelError
from fkernel.shapes import Tensor


class elementary(TorchFunctionMode):
    """While active, layer_norm is computed from elementary operations."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace the fused normalizations, pass everything else on."""
        kwargs = kwargs or {}
        if func in (F.layer_norm, torch.layer_norm):
            return _layer_norm(*args, **kwargs)
        if func is F.instance_norm or (func is F.batch_norm and _is_training(*args, **kwargs)):
            raise ModelError(
                f"{func.__name__} over batch statistics has no correct second forward derivative in torch (pytorch "
                f"issue 196699), so the curvature would be silently wrong; evaluate the module in eval mode."
            )
        return func(*args, **kwargs)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    """(x − mean x) / √(var x + ε) · weight + bias over the last dimensions."""
    dims = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(dims, keepdim=True)
    out = centred * ((centred * centred).mean(dims, keepdim=True) + eps).rsqrt()
    if weight is not None:
        out = out * weight
    return out if bias is None else out + bias


def _is_training(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    *_: Any,
    **__: Any,
) -> bool:
    return training
