"""Formats that need no bringing together: one file holds a state, or torch.distributed.checkpoint does it itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fkernel.checkpoint.contents import optimizer_in, weights_in
from fkernel.checkpoint.distributed import everything, read_distributed, weights_alone
from fkernel.checkpoint.files import read_tensors
from fkernel.checkpoint.formats.saved import Saved
from fkernel.checkpoint.layout import Layout
from fkernel.checkpoint.weights import read_safetensors


def read(layout: Layout, optimizer: bool = True) -> Saved:
    """Read the weights, where save_pretrained did not write them, and the optimizer's state_dict.

    Arguments and errors as in `fkernel.checkpoint.formats.read`.
    """
    weights: Mapping[str, Any] = {}
    state_dict: Any = None
    if layout.kind == "accelerate":
        weights = read_safetensors(layout.model)
    elif not layout.pretrained:
        weights, state_dict = _both_in(layout, optimizer)
    if layout.optimizer is not None and optimizer:
        state_dict = _optimizer_in(layout.optimizer)
    return Saved(weights, state_dict)


def _both_in(layout: Layout, optimizer: bool) -> tuple[Mapping[str, Any], Any]:
    """Read (the model's state dict, the optimizer's or None) where one file or directory may hold both."""
    if layout.kind == "file":
        found = read_tensors(layout.model, 'a checkpoint {"model": …, "optimizer": …}')
    else:
        found = read_distributed(layout.model, everything if optimizer else weights_alone)
    return weights_in(found, layout.model), optimizer_in(found, layout.model) if optimizer else None


def _optimizer_in(path: Path) -> Any:
    found = read_distributed(path) if path.is_dir() else read_tensors(path, "an optimizer state")
    state_dict = optimizer_in(found, path)
    return found if state_dict is None else state_dict  # which says what it lacks
