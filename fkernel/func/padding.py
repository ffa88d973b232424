"""The gradient of training where a padding token is inside of a sequence.

`torch.nn.Embedding(padding_idx=p)` drops the gradient of row p. With h_t = W[x_t] the embedded tokens,

    derivative     dS/dW = ∂S/∂W + Σ_t ∂S/∂h_t ∂h_t/∂W                   (∂S/∂W: a head that is tied to W)
    backward()             ∂S/∂W + Σ_{t: x_t ≠ p} ∂S/∂h_t ∂h_t/∂W

The effect of a step on E is the derivative; the optimizer's gradient of U is the second. They differ only where p is
inside a sequence and attended to, as in the prompts of a chat template whose padding token is also its end of turn.

The choice is made at every lookup with `padding_idx`, whichever module calls it, so adapters and wrappers behave as the
bare embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fkernel.boundary import public
from fkernel.shapes import Tensor


@public
def with_masked_padding_grad(apply: Any) -> Any:
    """Return the same function with the gradient of training, in reverse mode.

    Args:
        apply: as `make_functional` returns it.

    Returns:
        apply itself where no gradient is dropped. Values are the same; use it for U and its loss, and `apply` for E.

    Example:
        >>> from transformers import Qwen2Config, Qwen2ForCausalLM
        >>> from fkernel.func import make_functional
        >>> shape = {"vocab_size": 9, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1}
        >>> shape |= {"num_attention_heads": 1, "num_key_value_heads": 1, "pad_token_id": 0}
        >>> apply, params = make_functional(Qwen2ForCausalLM(Qwen2Config(**shape)))
        >>> apply.padding_idx, with_masked_padding_grad(apply).padding_idx
        (0, None)
    """
    return apply if apply.withholds is None else replace(apply, withholds=True, padding_idx=None)


def trained_padding(module: nn.Module, trained: Collection[str]) -> int | None:
    """Find the token id whose embedding row gets no gradient in training; None where no such row is trained.

    Args:
        module: with its embeddings, wrapped by adapters or bare.
        trained: names of the parameters that are trained.
    """
    root = module.get_input_embeddings() if hasattr(module, "get_input_embeddings") else None  # pyright: ignore
    for place, part in module.named_modules():
        if part is not root and (root is not None or not isinstance(part, nn.Embedding)):
            continue
        rows = [getattr(inner, "padding_idx", None) for inner in part.modules()]
        rows = [row for row in rows if row is not None]
        if rows and any(name.startswith(f"{place}.") for name in trained):
            return int(rows[0])
    return None


class padding_rows(TorchFunctionMode):
    """While active, lookups with `padding_idx` drop that row's gradient (as in training), or keep it."""

    def __init__(self, withheld: bool) -> None:
        """Choose the gradient of training (True) or the derivative (False)."""
        super().__init__()
        self.withheld = withheld

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace lookups, pass everything else on."""
        if func is F.embedding:
            return _lookup(self.withheld, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _lookup(
    withheld: bool, input: Tensor, weight: Tensor, padding_idx: int | None = None, *rest: Any, **options: Any
) -> Tensor:
    """Look up W[i]; drops the gradient in forward and reverse mode, while torch does in reverse mode only."""
    embedded = F.embedding(input, weight, None, *rest, **options)
    if padding_idx is None or not withheld:
        return embedded
    row = padding_idx % weight.shape[0]
    return torch.where((input == row)[..., None], embedded.detach(), embedded)
