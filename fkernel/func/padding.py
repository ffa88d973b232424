"""The gradient that training takes where a padding token stands inside of a sequence.

`torch.nn.Embedding(padding_idx=p)` withholds the gradient of row p. With h_t = W[x_t] the embedded tokens,

    derivative     dS/dW = ∂S/∂W + Σ_t ∂S/∂h_t ∂h_t/∂W                   (∂S/∂W: a head that is tied to W)
    backward()             ∂S/∂W + Σ_{t: x_t ≠ p} ∂S/∂h_t ∂h_t/∂W

What a step does to a sequence of E is told by the derivative; what the optimizer was given by a sequence of U is the
second. They differ only where p stands inside a sequence and is attended to, as in the prompts of a chat template whose
padding token doubles as its end of turn.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from fkernel.func.functional import Apply, structural_copy
from fkernel.shapes import Tensor


def as_trained(apply: Apply) -> Apply:
    """Make the same function with the gradient that a training run takes of it, in reverse mode.

    Args:
        apply: as `make_functional` returns it.

    Returns:
        apply itself where no row is withheld. Values are the same; use it for U and its loss, and `apply` for E.

    Example:
        >>> from transformers import Qwen2Config, Qwen2ForCausalLM
        >>> from fkernel.func import make_functional
        >>> shape = {"vocab_size": 9, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1}
        >>> shape |= {"num_attention_heads": 1, "num_key_value_heads": 1, "pad_token_id": 0}
        >>> apply, params = make_functional(Qwen2ForCausalLM(Qwen2Config(**shape)))
        >>> apply.padding_idx, as_trained(apply).padding_idx
        (0, None)
    """
    if apply.padding_idx is None:
        return apply
    module: Any = structural_copy(apply.module)
    module.get_input_embeddings().register_forward_hook(partial(_withheld, apply.padding_idx))
    return replace(apply, module=module, padding_idx=None)


def _withheld(padding_idx: int, module: nn.Module, inputs: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
    """Cut the cotangent of embedded padding off."""
    return torch.where((inputs[0] == padding_idx)[..., None], embedded.detach(), embedded)
