"""Reading what a training run left: tensors and JSON, and nothing that a file could make us execute."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch

from fkernel.errors import CheckpointError


def read_tensors(path: Path, what: str) -> Any:
    """Read a file of `torch.save`, tensors and plain containers only.

    Args:
        path: the file.
        what: what is expected in it, for the message.

    Raises:
        CheckpointError: it is missing, damaged, or holds objects that would have to be executed.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"There is no file {path}; expected {what}.") from None
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} could not be read as tensors only ({first_line(error)}); expected {what}, written by torch.save "
            f"without objects of other classes: nothing that a file contains is executed."
        ) from error


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file.

    Raises:
        CheckpointError: it is missing or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"There is no file {path}; expected {what}.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no JSON ({first_line(error)}); expected {what}.") from error


def first_line(error: BaseException) -> str:
    """Give the first line of a library's message, which may have dozens."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
