"""A torch function mode in which nothing is detached, for `fkernel.func.detach`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_DETACHING = {torch.Tensor.detach, torch.detach, torch.Tensor.detach_, torch.Tensor.data.__get__}  # pyright: ignore


class seen_through(TorchFunctionMode):
    """While active, `detach`, `data` and `no_grad` do not cut the graph."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make detaching the identity and ignore switching gradients off; pass everything else on."""
        if func in _DETACHING:
            return args[0]
        if func is torch._C._set_grad_enabled:
            return None
        return func(*args, **(kwargs or {}))
