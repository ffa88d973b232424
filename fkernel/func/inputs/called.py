"""How a model is called: by keywords, as Hugging Face's are, or with ids and mask alone."""

from __future__ import annotations

from inspect import signature
from typing import Any

from torch import nn

from fkernel.shapes import Tensor


def _is_hugging_face(module: nn.Module) -> bool:
    """Whether a module is called as Hugging Face's are; one of the user's own may have a `config` too."""
    if not hasattr(module, "config"):
        return False
    taken = signature(module.forward).parameters
    return "use_cache" in taken or any(p.kind is p.VAR_KEYWORD for p in taken.values())


def arguments_of(module: nn.Module, input_ids: Tensor, mask: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """(args, kwargs) with which a module returns the logits of all tokens; kwargs for Hugging Face's alone.

    Example:
        >>> import torch
        >>> arguments_of(nn.Identity(), torch.ones(1, 2), torch.ones(1, 2))
        ((tensor([[1., 1.]]), tensor([[1., 1.]])), {})
    """
    if _is_hugging_face(module):
        return (), {"input_ids": input_ids, "attention_mask": mask, "use_cache": False}
    return (input_ids, mask), {}
