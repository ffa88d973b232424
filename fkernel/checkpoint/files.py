"""Reading what a training run left: tensors and JSON, and nothing that a file could make us execute."""

from __future__ import annotations

import json
import pickle
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fkernel.checkpoint.quiet import libraries_quiet
from fkernel.errors import CheckpointError

COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
UNPICKLER = "WeightsUnpickler error: "
"""Where PyTorch says which class of a file it does not make, four lines down."""


@libraries_quiet()
def read_tensors(path: Path, what: str) -> Any:
    """Read a file of `torch.save`, tensors and plain containers only.

    Args:
        path: the file.
        what: what is expected in it, for the message.

    Raises:
        CheckpointError: it is missing, damaged, or holds objects that would have to be executed.
    """
    try:
        return _loaded(path)
    except FileNotFoundError:
        raise CheckpointError(f"There is no file {path}; expected {what}.") from None
    except Exception as error:  # what rebuilds a tensor raises whatever it likes
        raise CheckpointError(
            f"{path} could not be read as tensors only ({first_line(error)}); expected {what}, written by torch.save "
            f"without objects of other classes: nothing that a file contains is executed."
        ) from error


def _loaded(path: Path) -> Any:
    """Load tensors only. torchao's quantised moments are known once it is imported: its code, not the file's."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL torchao." not in str(error) or find_spec("torchao") is None:
            raise
    import_module("torchao.optim")
    return torch.load(path, map_location="cpu", weights_only=True)


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
    r"""Give the line of a library's message that says what is wrong, without colours: the first, as a rule.

    PyTorch says which class of a file it refused at the end of a page about how to make it execute the file.

    Example:
        >>> first_line(ValueError("\x1b[1mNot that one.\x1b[0m\nThere are 50 others."))
        'Not that one.'
        >>> first_line(OSError("No.\n\tWeightsUnpickler error: GLOBAL a.B was not an allowed global by default."))
        'GLOBAL a.B was not an allowed global'
    """
    lines = [line.strip() for line in plain(error).splitlines() if line.strip()]
    refused = next((line.partition(UNPICKLER)[2] for line in lines if UNPICKLER in line), "")
    return refused.partition(" by default.")[0] or (lines[0] if lines else type(error).__name__)


def plain(error: BaseException) -> str:
    """Give a library's message without the codes that colour it on a terminal."""
    return COLOURS.sub("", str(error)).strip()
