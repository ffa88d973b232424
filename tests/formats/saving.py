"""Save again what `read_tensors` has read: its inert stand-ins are written as the classes that they stand for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fkernel.checkpoint.files import STAND_INS, Inert


def save_again(found: Any, path: Path) -> None:
    """Write a file of torch.save that reads as `found` does, though the trainers' packages are not there."""
    with classes() as made:
        torch.save(_restored(found, made), path)


@contextmanager
def classes() -> Iterator[dict[str, type]]:
    """Make empty classes under the trainers' names, for as long as something is saved."""
    kept = dict(sys.modules)
    made: dict[str, type] = {}
    for name in STAND_INS:
        module, _, own = name.rpartition(".")
        if module.split(".")[0] in kept:
            continue
        made[name] = _made(module, own)
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:end]), ModuleType(".".join(parts[:end])))
        setattr(sys.modules[module], own, made[name])
    try:
        yield made
    finally:
        for name in {*sys.modules} - {*kept}:
            del sys.modules[name]


@cache
def _made(module: str, name: str) -> type:
    return type(name, (_Named,), {"__module__": module})


class _Named:
    """An instance that is saved as a call of its class with what an inert one was given."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __reduce__(self) -> Any:
        state = self.__dict__.get("state")
        return (type(self), self.args) if state is None else (type(self), self.args, state)


def _restored(found: Any, made: dict[str, type]) -> Any:
    if isinstance(found, Inert):
        state = getattr(found, "state", None)
        kind = "ZeroStageEnum" if state is None else "fragment_address" if "numel" in state else "LossScaler"
        each: Any = next(cls for name, cls in made.items() if name.endswith(kind))(*getattr(found, "args", ()))
        each.state = state
        return each
    if isinstance(found, dict):
        for key, value in found.items():
            found[key] = _restored(value, made)
        return found
    if isinstance(found, list):
        found[:] = [_restored(value, made) for value in found]
        return found
    if isinstance(found, tuple) and type(found) is tuple:
        return tuple(_restored(value, made) for value in found)
    return found
