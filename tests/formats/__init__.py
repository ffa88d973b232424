"""Checkpoints by the trainers' own writers: how they are written (`make formats`), and that they are read right."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType


def modules() -> list[str]:
    """List the writers' modules."""
    return sorted(path.stem for path in (Path(__file__).parent / "writers").glob("[a-z]*.py"))


def writer_of(name: str) -> ModuleType:
    """Import the module that writes a run; others, whose packages may not be there, are not imported.

    A run's name begins with its module's: deepspeed_zero1_fp32 is of writers/deepspeed.py.
    """
    return import_module(f"tests.formats.writers.{next(each for each in modules() if name.startswith(f'{each}_'))}")
