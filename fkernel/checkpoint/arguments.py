"""Settings of the trainer that wrote a checkpoint, as far as they can be read without executing anything.

training_args.bin is a pickle of an object, and unpickling it would run code. Its instructions are listed instead, as a
text is: where one names a setting, and the next one holds a flag or a number, that is the setting's value. Nothing is
built from it.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fkernel.checkpoint.files import read_json

PICKLED, PLAIN = "training_args.bin", "training_args.json"
SCALER = "scaler.pt"
"""Of float16's loss scaling: a trainer saves it only where it used it."""
STORED = ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT")
FETCHED = ("GET", "BINGET", "LONG_BINGET")
WORDS = ("BINUNICODE", "SHORT_BINUNICODE", "UNICODE", "BINUNICODE8")
VALUES = {"NEWTRUE": True, "NEWFALSE": False, "NONE": None}
OTHER = object()
"""In the place of a value that is no flag and no number: what is named so again later is another thing's."""
NUMERIC = ("BINFLOAT", "FLOAT", "BININT", "BININT1", "BININT2", "INT", "LONG1")


def trainer_settings(*places: Path) -> dict[str, Any]:
    """Read the flags and numbers that a trainer was given, from the first directory that tells.

    Args:
        places: directories, the checkpoint's first.

    Returns:
        {setting: value}; empty where nothing tells. A loss scaler's file says that fp16 is True.

    Raises:
        CheckpointError: training_args.json is no JSON.
    """
    arguments: dict[str, Any] = {}
    for place in places:
        if (place / PLAIN).is_file():
            given = read_json(place / PLAIN, "a trainer's settings")
            arguments = dict(given) if isinstance(given, Mapping) else {}
        elif (place / PICKLED).is_file():
            arguments = _listed(place / PICKLED)
        if (place / SCALER).is_file():
            arguments["fp16"] = True
        if arguments:
            break
    return arguments


def _listed(path: Path) -> dict[str, Any]:
    """Go through a pickle's instructions; a damaged one tells nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            inside = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            return _settings(archive.read(inside))
    except (OSError, ValueError, StopIteration, zipfile.BadZipFile):
        return {}


def _settings(stream: bytes) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    remembered: dict[int, Any] = {}
    word: str | None = None  # the text that the instruction before gave
    for code, argument, _ in pickletools.genops(stream):
        if code.name in STORED:
            remembered[len(remembered) if argument is None else int(str(argument))] = word
            continue
        if word is not None and code.name not in WORDS + FETCHED:
            known = code.name in VALUES or code.name in NUMERIC
            arguments.setdefault(word, VALUES.get(code.name, argument) if known else OTHER)
        word = None
        if code.name in WORDS:
            word = str(argument)
        elif code.name in FETCHED:
            word = remembered.get(int(str(argument)))  # None, where it is no text
    return {key: value for key, value in arguments.items() if value is not OTHER}
