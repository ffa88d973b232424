"""Reading what a training run left: tensors and JSON, and nothing that a file could make us execute.

A file of torch.save is a zip archive whose entries carry CRC-32 sums, which torch.load does not look at: a flipped byte
would be another number. They are checked first. The archive's folder is named like the file that it was saved to, so
that a file that was renamed tells which one it was (`saved_as`).
"""

from __future__ import annotations

import pickle
import re
import zipfile
from importlib import import_module
from importlib.util import find_spec
from io import IOBase
from pathlib import Path
from typing import Any

import torch

from fkernel.checkpoint.quiet import libraries_quiet
from fkernel.errors import CheckpointError
from fkernel.io import parse_json

COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
UNPICKLER = "WeightsUnpickler error: "
"""Where PyTorch says which class of a file it does not make, four lines down."""


CHUNK = 1 << 20
"""Bytes that are summed at a time."""


class Inert:
    """Stands in for a class of a trainer's that its files name: it takes whatever it is given and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


STAND_INS = (
    *("deepspeed.runtime.fp16.loss_scaler.LossScaler", "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    *("deepspeed.runtime.zero.config.ZeroStageEnum", "deepspeed.utils.tensor_fragment.fragment_address"),
    *("numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype"),
)
"""Classes that trainers put beside tensors and that mean nothing here; every other one is refused by its name."""


@libraries_quiet()
def read_tensors(path: Path, what: str, *, mmap: bool = False) -> Any:
    """Read a file of `torch.save`, tensors and plain containers only.

    Args:
        path: the file.
        what: what is expected in it, for the message.
        mmap: map the file instead of reading it: what is not touched takes no memory, and the file must stay.

    Raises:
        CheckpointError: it is missing, damaged, or holds objects that would have to be executed.
    """
    try:
        with path.open("rb") as file:
            check_sums(file, path)
        return _loaded(path, mmap)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"There is no file {path}; expected {what}.") from None
    except Exception as error:  # what rebuilds a tensor raises whatever it likes
        raise CheckpointError(
            f"{path} could not be read as tensors only ({first_line(error)}); expected {what}, written by torch.save "
            f"without objects of other classes: nothing that a file contains is executed."
        ) from error


def check_sums(file: IOBase, path: Any) -> None:
    r"""Check the sums of a zip archive's entries; anything else, such as torch's format before 1.6, has none.

    Args:
        file: the archive, open.
        path: its name, for the message.

    Raises:
        CheckpointError: an entry is not what was written.

    Example:
        >>> import io
        >>> torch.save(torch.ones(2), file := io.BytesIO())
        >>> check_sums(file, "x.pt")
        >>> _ = file.getbuffer().__setitem__(file.getvalue().index(b"\x80?"), 1)
        >>> check_sums(file, "x.pt")
        Traceback (most recent call last):
        ...
        fkernel.errors.CheckpointError: x.pt is damaged: Bad CRC-32 for file 'archive/data/0'. Copy it again from...
    """
    if not zipfile.is_zipfile(file):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:  # torch.save compresses nothing, and a page may be a bomb
                    raise CheckpointError(f"{path} has compressed entries; torch.save writes none. Save it with that.")
                if entry.CRC == 0:  # not computed: torch.serialization.set_crc32_options(False)
                    continue
                with archive.open(entry) as data:
                    while data.read(CHUNK):
                        pass
    except CheckpointError:
        raise
    except Exception as error:  # a damaged directory of entries raises whatever it likes
        raise CheckpointError(
            f"{path} is damaged: {first_line(error)}. Copy it again from where it was saved."
        ) from error


def saved_as(path: Path) -> str | None:
    """Tell the stem of the name under which torch.save wrote a file; None where it was not given a name.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     torch.save({}, f"{place}/rank_0.pt")
        ...     saved_as(Path(place, "rank_0.pt").rename(Path(place, "rank_1.pt")))
        'rank_0'
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = archive.namelist()[0].split("/")[0]
    except Exception:  # whoever reads it says what is wrong with it
        return None
    return None if root == "archive" else root


def check_saved_as(path: Path) -> None:
    """Raise CheckpointError where a file of one rank was saved under another name: it is another rank's."""
    written = saved_as(path)
    if written is not None and written != path.stem:
        raise CheckpointError(
            f"{path} was saved as {written}{path.suffix}: it is another rank's or step's, with this one's name. "
            f"Put every rank's file back under its own name."
        )


def _loaded(path: Path, mmap: bool) -> Any:
    """Load tensors only. torchao's quantised moments are known once it is imported: its code, not the file's."""
    import_module("torch.distributed.tensor")  # registers DTensor with the reader of tensors
    inert: list[Any] = [(Inert, name) for name in STAND_INS]
    with torch.serialization.safe_globals(inert):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            if "GLOBAL torchao." not in str(error) or find_spec("torchao") is None:
                raise
        import_module("torchao.optim")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file.

    Raises:
        CheckpointError: it is missing or is no JSON.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"))
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
