"""Whether a result can be right: every number in it finite, and that of another way to compute it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch


class NotRightError(Exception):
    """A result that is not what it should be."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def check_finite(value: Any) -> None:
    """Raise NotRightError where a number in a result is NaN or infinite."""
    for name, leaf in numbers_of(value):
        if not bool(np.isfinite(leaf).all()):
            raise NotRightError("NOT FINITE", f"{name} has a NaN or an infinity")


def numbers_of(value: Any, name: str = "result") -> Iterator[tuple[str, Any]]:
    """Walk through the tensors, arrays and numbers of a result that are no whole numbers."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and not value.is_meta and value.layout == torch.strided:
            yield name, value.detach().double().numpy()
    elif isinstance(value, float | np.floating | np.ndarray):
        if np.asarray(value).dtype.kind == "f":
            yield name, value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from numbers_of(each, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for i, each in enumerate(value):
            yield from numbers_of(each, f"{name}.{i}")
    elif is_dataclass(value) and not isinstance(value, type):
        yield from numbers_of(vars(value), name)
