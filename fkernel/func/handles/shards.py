"""Per-sequence gradients a range of a parameter at a time, in storage allocated once: what contractions walk."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from fkernel.func.handles.forms import Handle, count, materialize_into, shape_of, tensors
from fkernel.shapes import Tensor

TILE_COLUMNS = 1 << 17
"""Columns of a formed shard, at most; with smaller ones forming is slower, with larger ones memory."""
LEAST_COLUMNS = 1 << 13
TILE_BYTES = 64 << 20
"""Storage for formed shards: many sequences get fewer columns."""


def tile_columns(rows: int, itemsize: int) -> int:
    """Columns of a shard that is formed for so many sequences."""
    return min(TILE_COLUMNS, max(LEAST_COLUMNS, TILE_BYTES // (itemsize * max(1, rows))))


def tile_bytes(rows: int, itemsize: int) -> int:
    """Bytes of the shards that are formed for so many sequences, both sides together."""
    return rows * itemsize * tile_columns(rows, itemsize)


def tiles(x: Handle, step: int, dtype: torch.dtype) -> Callable[[int, int], Tensor]:
    """Make (start, r) -> [n, r·width], rows start … start + r of the leading dimension; dense ones are not copied."""
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
