"""Shape annotations: jaxtyping's where it is installed (tests execute them), plain tensors elsewhere.

The letters are the same everywhere: `n`, `m` sequences, `t` tokens, `v` vocabulary, `p` parameters of one shard.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped
else:
    try:
        from jaxtyping import Float, Int, Shaped
    except ModuleNotFoundError:

        class Shaped:
            """`Shaped[Tensor, "n t"]` read as `Tensor`."""

            def __class_getitem__(cls, item: Any) -> Any:
                return item[0]

        Float = Int = Shaped

Tensor = torch.Tensor
Tree = dict[str, torch.Tensor]
"""A pytree of tensors keyed by parameter name: parameters, a gradient, a direction, per-sequence gradients."""

__all__ = ["Float", "Int", "Shaped", "Tensor", "Tree"]
