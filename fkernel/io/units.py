"""Sizes in bytes as people write them."""

from __future__ import annotations

import re

from fkernel.errors import BatchError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(memory: int | str) -> int:
    """Read a size such as "8GiB", "500MB" or a plain number of bytes.

    Raises:
        BatchError: the text is not a size.

    Example:
        >>> parse_bytes("1.5KiB")
        1536
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgG]?[iI]?[bB]?)\s*", str(memory))
    unit = match.group(2).upper() if match else "?"
    if match is None or unit not in _UNITS:
        raise BatchError(f"memory is {memory!r}; expected bytes, or a size such as '500MB' or '8GiB'.")
    return int(float(match.group(1)) * _UNITS[unit])
