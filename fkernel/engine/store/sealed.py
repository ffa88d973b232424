"""JSON that carries its own checksum: a flipped digit in a number is still JSON, and nothing else would tell."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

SEAL = "seal"


def sealed(content: Mapping[str, Any]) -> bytes:
    """Write content as JSON, with a hash of it under "seal".

    Raises:
        TypeError, ValueError: it is no JSON.

    Example:
        >>> unsealed(sealed({"clip": 0.5}))
        {'clip': 0.5}
    """
    return (json.dumps({**content, SEAL: _seal(content)}, indent=1, allow_nan=False) + "\n").encode()


def unsealed(text: bytes) -> dict[str, Any]:
    """Read what `sealed` wrote.

    Raises:
        ValueError: it is no JSON, no object, or not what was written.

    Example:
        >>> unsealed(sealed({"clip": 0.5}).replace(b"0.5", b"0.6"))
        Traceback (most recent call last):
        ValueError: its seal does not fit: it is not what was written
    """
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"expected an object, found a {type(found).__name__}")
    if found.pop(SEAL, None) != _seal(found):
        raise ValueError("its seal does not fit: it is not what was written")
    return found


def _seal(content: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(dict(content), allow_nan=False))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
