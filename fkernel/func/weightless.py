"""Modules without weights: the architecture alone, for parameters that come from elsewhere.

A module that is made on the meta device loses its buffers too, and these are in no checkpoint (a rotary embedding's
frequencies, which `to_empty` would leave as whatever the memory holds). So parameters alone are made there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def without_weights() -> Iterator[None]:
    """Have modules that are made within the context hold parameters on the meta device, and buffers as they are.

    Example:
        >>> with without_weights():
        ...     norm = nn.BatchNorm1d(3)
        >>> norm.weight.device.type, norm.running_var
        ('meta', tensor([1., 1., 1.]))
    """
    own = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        own(self, name, param)
        if type(param) is nn.Parameter and not param.is_meta:
            self._parameters[name] = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = register
    try:
        yield
    finally:
        nn.Module.register_parameter = own
