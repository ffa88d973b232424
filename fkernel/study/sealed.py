"""The files of finished results: each by checksum bound to results.json, and that to itself.

Two runs into one directory cannot leave one's numbers beside the other's: results.json, written last, has the SHA-256
of kernel.npz, of plan.json and of its own content. What it says in numbers is compared with the arrays when it is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import numpy as np

from fkernel.errors import ResultsError
from fkernel.io import (
    atomic_file,
    atomic_write,
    checksum,
    checksummed_json,
    make_directory,
    parse_json,
    read_checksummed,
    remove_file,
)

ARRAYS, RECORD = "kernel.npz", "results.json"
BESIDE = ("plan.json", "environment.json")
ROUNDING = 1e-9
"""Relative difference of what two machines make of the same arrays."""


DAMAGED = (OSError, ValueError, KeyError, EOFError, MemoryError, NotImplementedError, SyntaxError, BadZipFile)
"""What reading a damaged file of arrays raises."""


class Files(NamedTuple):
    """What a results directory holds."""

    plan: dict[str, Any]
    environment: dict[str, Any]
    record: dict[str, Any]
    arrays: dict[str, np.ndarray]


def write_files(
    directory: Path,
    plan: Mapping[str, Any],
    environment: Mapping[str, Any],
    record: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
) -> Path:
    """Write a results directory, results.json last; nothing is replaced before everything is encoded.

    Returns:
        The directory.

    Raises:
        ResultsError: something is no JSON, or no finite number.
    """
    try:
        texts = {name: _json(content) for name, content in zip(BESIDE, (plan, environment), strict=True)}
        checksummed_json(record)
    except (TypeError, ValueError) as error:
        raise ResultsError(f"These results cannot be written, and {directory} is left as it was: {error}.") from error
    make_directory(directory)
    remove_file(directory / RECORD)  # missing while the others are being replaced
    with atomic_file(directory / ARRAYS) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)  # pyright: ignore[reportArgumentType]
    for name, text in texts.items():
        atomic_write(directory / name, [text])
    atomic_write(directory / RECORD, [checksummed_json({**record, "sha256": _checksums(directory)})])
    return directory


def read_files(directory: Path, schema: int) -> Files:
    """Read a results directory.

    Raises:
        ResultsError: a file is missing, is not what was written with the others, or is of another schema.
    """
    try:
        _check_schema(parse_json((directory / RECORD).read_bytes()), directory, schema)
        record = read_checksummed(directory / RECORD)
        plan, environment = (parse_json((directory / name).read_bytes()) for name in BESIDE)
        arrays, actual = read_arrays(directory / ARRAYS), _checksums(directory)
    except ResultsError:
        raise
    except DAMAGED as error:
        raise ResultsError(
            f"{directory} holds no readable results.json, plan.json, environment.json and kernel.npz: {error}"
        ) from error
    written = record.pop("sha256", None)
    written = written if isinstance(written, dict) else {}
    if wrong := [name for name in actual if actual[name] != written.get(name)]:
        raise ResultsError(
            f"{directory / wrong[0]} is not the file that was written with {directory / RECORD}; put that one back, or "
            f"run the plan again."
        )
    return Files(plan, environment, record, arrays)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read a file of `numpy.savez`; nothing is unpickled, and nothing takes more memory than the file.

    Raises:
        *DAMAGED: it is none.
    """
    with ZipFile(path) as archive:
        if any(entry.compress_type != ZIP_STORED for entry in archive.infolist()):
            raise ValueError(f"{path.name} has compressed entries, which are not written here")
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    if wrong := [name for name, values in arrays.items() if not isinstance(values, np.ndarray)]:
        raise ValueError(f"{path.name} holds {wrong[0]!r}, which is no array")
    return arrays


def check_arrays(arrays: Mapping[str, np.ndarray], request: str, width: int) -> None:
    """Check that a request's arrays are finite, and that the places of its top contributors are places.

    Raises:
        ResultsError: they are not.
    """
    for name, values in arrays.items():
        if not np.isfinite(values).all():
            raise ResultsError(f"{name} of the request {request!r} holds a NaN or an infinity; run the plan again.")
    top = arrays.get("top")
    if top is not None and top.size and (top.min() < 0 or top.max() >= width):
        raise ResultsError(f"top of the request {request!r} names sequences that the {width} of U are not.")


def check_agrees(made: Mapping[str, Any], record: Mapping[str, Any], place: Path) -> None:
    """Check that a file of JSON says of the arrays beside it what they say.

    Args:
        made: its content, as these arrays would be written.
        record: its content, as it was read.
        place: the file, for the message.

    Raises:
        ResultsError: it does not, and where.
    """
    if (key := _apart(parse_json(_json(made)), record)) is not None:
        raise ResultsError(f"{place} and the arrays beside it differ in {key.lstrip('.')}; have both made again.")


def _apart(one: Any, other: Any) -> str | None:
    """The first place in which two JSON values differ by more than rounding; "" for themselves."""
    if isinstance(one, dict) and isinstance(other, dict):
        if {*one} != {*other}:
            return f".{min({*one} ^ {*other})}"
        pairs = [(key, one[key], other[key]) for key in one]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [(number, *each) for number, each in enumerate(zip(one, other, strict=True))]
    elif isinstance(one, float) and isinstance(other, float | int):
        return None if math.isclose(one, other, rel_tol=ROUNDING, abs_tol=1e-300) else ""
    else:
        return None if one == other else ""
    for key, *each in pairs:
        if (place := _apart(*each)) is not None:
            return f".{key}{place}"
    return None


def _check_schema(record: Any, directory: Path, schema: int) -> None:
    """Before the seal, since other versions had others."""
    given = record.get("schema") if isinstance(record, dict) else None
    if given != schema:
        raise ResultsError(f"{directory} was written with schema {given}; this fkernel reads {schema}.")


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


def _checksums(directory: Path) -> dict[str, str]:
    """Of what a run computes; environment.json has times, and another run's is the same results'."""
    return {name: checksum(directory / name) for name in (ARRAYS, "plan.json")}
