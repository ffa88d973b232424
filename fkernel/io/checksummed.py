"""JSON files that contain a checksum of their content, which detects changed numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fkernel.io.documents import parse_json
from fkernel.io.fingerprints import hash_json

SEAL = "seal"
"""The checksum's key."""


def checksummed_json(content: Mapping[str, Any]) -> bytes:
    """Write content as JSON, with a SHA-256 of it under "seal".

    Raises:
        TypeError, ValueError: the content is not JSON.

    Example:
        >>> json.loads(checksummed_json({"clip": 0.5}))
        {'clip': 0.5, 'seal': 'b5ae123915f3...'}
    """
    plain = json.loads(json.dumps(dict(content), allow_nan=False))
    return (json.dumps({**plain, SEAL: hash_json(plain)}, indent=1, ensure_ascii=False) + "\n").encode()


def read_checksummed(path: Path) -> dict[str, Any]:
    """Read a file of `checksummed_json`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, not an object, or its checksum differs.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     written = Path(file.name).write_bytes(checksummed_json({"clip": 0.5}).replace(b"0.5", b"0.6"))
        ...     read_checksummed(Path(file.name))
        Traceback (most recent call last):
        ValueError: its checksum differs: it is not what was written
    """
    content = parse_json(path.read_bytes())
    if not isinstance(content, dict):
        raise ValueError(f"expected an object, found a {type(content).__name__}")
    if content.pop(SEAL, None) != hash_json(content):
        raise ValueError("its checksum differs: it is not what was written")
    return content


def is_json(value: Any) -> bool:
    """Tell whether a value can be written as JSON, without NaN and infinities.

    Args:
        value: any.

    Example:
        >>> is_json({"lr": 0.1}), is_json(float("nan")), is_json(object())
        (True, False, False)
    """
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
