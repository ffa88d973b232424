"""How many gradient rows a memory grant holds."""

from __future__ import annotations

import re

from fkernel import tree
from fkernel.errors import BatchError
from fkernel.shapes import Tree

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


def check_vectors_fit(params: Tree, memory: int | str | None, vectors: int = 3) -> None:
    """Raise BatchError where a grant does not hold a few vectors of the parameters' size."""
    needed = vectors * _row_bytes(params)
    if memory is not None and parse_bytes(memory) < needed:
        raise BatchError(
            f"memory={memory!r} cannot hold the {vectors} vectors of {tree.size(params)} parameters that are needed; "
            f"give at least {needed} bytes."
        )


def rows_that_fit(params: Tree, memory: int | str | None, wanted: int, microbatch: int) -> int:
    """Count the held gradient rows that fit a grant, beside one microbatch of the streamed side (raw and transformed).

    Args:
        params: one row's size is theirs.
        memory: bytes granted to gradients; None grants whatever is wanted.
        wanted: rows that would be held if memory were no object.
        microbatch: rows of the streamed side that are alive at once.

    Raises:
        BatchError: not even one row fits; the message says what would be needed.
    """
    if memory is None:
        return wanted
    row = _row_bytes(params)
    alive = 3 * min(
        microbatch, wanted
    )  # the streamed microbatch: its gradients, their image under P, one in the making
    rows = parse_bytes(memory) // row - alive
    if rows < 1:
        raise BatchError(
            f"memory={memory!r} cannot hold one gradient beside a microbatch of {microbatch}: one gradient of "
            f"{tree.size(params)} parameters takes {row} bytes, so give at least {row * (alive + 1)} bytes, or a "
            f"smaller microbatch; influence() needs no gradient rows at all."
        )
    return min(rows, wanted)


def _row_bytes(params: Tree) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in params.values())
