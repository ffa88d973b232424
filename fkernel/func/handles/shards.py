"""Tiles of per-sequence gradients for contractions: a range of a parameter at a time, in reused storage."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from fkernel.func.handles.forms import Handle, count, materialize_into, shape_of, tensors
from fkernel.shapes import Tensor

TILE_COLUMNS = 1 << 17
"""Largest number of columns of a tile; smaller tiles are slower to multiply out, larger ones to read."""
LEAST_COLUMNS = 1 << 13
TILE_BYTES = 64 << 20
"""Storage of a tile: more sequences, fewer columns."""


def tile_columns(rows: int, itemsize: int) -> int:
    """Return the columns of a tile for so many sequences."""
    return min(TILE_COLUMNS, max(LEAST_COLUMNS, TILE_BYTES // (itemsize * max(1, rows))))


def tile_bytes(rows: int, itemsize: int) -> int:
    """Return the bytes of the tiles for so many sequences, x and y together."""
    return rows * itemsize * tile_columns(rows, itemsize)


def tiles(x: Handle, step: int, dtype: torch.dtype) -> Callable[[int, int], Tensor]:
    """Return (start, r) -> [n, r·width], rows start … start + r of the leading dimension; dense ones are not copied."""
    shape, n = shape_of(x), count(x)
    width = math.prod(shape[1:])
    if isinstance(x, Tensor) and x.dtype == dtype:
        flat = x.flatten(1)
        return lambda start, r: flat[:, start * width : (start + r) * width]
    room = tensors(x)[-1].new_empty(n * min(step, shape[0]), width, dtype=dtype)

    def formed(start: int, r: int) -> Tensor:
        out = room[: n * r].view(n, r, *shape[1:])
        materialize_into(x, out, start)
        return out.view(n, -1)

    return formed
